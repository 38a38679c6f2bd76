"""Who is calling: from an `Authorization` header to a `Caller`, without a database read on the warm path.

Caches, both keyed by the HMAC of the whole key, never by its public id alone (a wrong secret for a cached id takes the
same way as any unknown key, so its timing tells nothing of who was here lately):

- known: keys that are good, until they are invalidated. Expiry is checked on every request.
- refused: keys that are not, for a few seconds.

Both are bounded and drop the least recently used. Keys that are in neither wait for one look-up at a time, which takes
what has gathered meanwhile, in order: equal keys share a row, and a flood of wrong keys costs one query a round trip,
not one each. If a look-up fails, everybody who waits is told at once.

Invalidation comes over NOTIFY. A look-up that was under way at that moment answers those who wait, whose requests came
before, but is not kept. While the channel is down a known key lives at most five minutes from the moment it went down;
when it is back everything is dropped, since notifications of the time between are gone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import asyncpg
from msgspec import Struct

from tenants import keys, queries
from tenants.errors import AuthUnavailable, KeyRefused
from tenants.keys import KeyKind, KeyText
from tenants.model import Caller, KeyId
from tenants.queries.database import AWAY, within

KNOWN_MAX: Final = 50_000
REFUSED_MAX: Final = 10_000
REFUSED_S: Final = 5.0
CHANNEL_DOWN_S: Final = 300.0
LOOKUP_S: Final = 2.0
LOOKUP_KEYS: Final = 256
_UNKNOWN: Final = "this API key is not known here, or was revoked"


class _Known(Struct, frozen=True):
    caller: Caller
    expires_at: float
    loaded_at: float


class _Refused(Struct, frozen=True):
    message: str
    until: float


_Verdict = _Known | _Refused


class Authenticator:
    """Checks keys against `api_key`; owned by one event loop."""

    def __init__(self, pool: asyncpg.Pool[Any], pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        """`clock` (seconds since the epoch) stamps what a look-up brought; it ends later than the request's `now`."""
        self._pool = pool
        self._pepper = pepper
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._digests: dict[KeyId, bytes] = {}
        """Of the known keys: for invalidation by public id."""
        self._refused: OrderedDict[bytes, _Refused] = OrderedDict()
        self._wanted: dict[bytes, tuple[KeyText, asyncio.Future[_Verdict]]] = {}
        self._looking: dict[bytes, asyncio.Future[_Verdict]] = {}
        self._lookup: asyncio.Task[None] | None = None
        self._generation = 0
        """Grows with every invalidation: what was read before is not kept."""
        self._down_since: float | None = -math.inf

    async def authenticate(self, authorization: str | None, *, now: float) -> Caller:
        """The caller whose key the header has.

        Raises `KeyRefused`; `AuthUnavailable` if the key is not cached and Postgres does not answer within seconds.
        """
        key = keys.parse(keys.bearer(authorization))
        digest = keys.digest(self._pepper, key)
        verdict = self._cached(digest, now) or await self._look_up(key, digest)
        if isinstance(verdict, _Refused):
            raise KeyRefused(verdict.message)
        if verdict.expires_at <= now:
            raise KeyRefused("this API key has expired")
        return verdict.caller

    def invalidate(self, key_id: str) -> None:
        """Forget a key, since it was revoked or changed, and what was refused, since it may be good now."""
        self._generation += 1
        digest = self._digests.pop(KeyId(key_id), None)
        if digest is not None:
            del self._known[digest]
        self._refused.clear()

    def channel_changed(self, up: bool, now: float) -> None:
        """The channel that `invalidate` hangs on was lost or is there (again)."""
        if not up:
            if self._down_since is None:
                self._down_since = now
            return
        self._down_since = None
        self._generation += 1
        self._known.clear()
        self._digests.clear()
        self._refused.clear()

    def _cached(self, digest: bytes, now: float) -> _Verdict | None:
        known = self._known.get(digest)
        if known is not None:
            if self._down_since is not None and now - max(known.loaded_at, self._down_since) > CHANNEL_DOWN_S:
                return None
            self._known.move_to_end(digest)
            return known
        refused = self._refused.get(digest)
        if refused is not None and now < refused.until:
            self._refused.move_to_end(digest)
            return refused
        return None

    async def _look_up(self, key: KeyText, digest: bytes) -> _Verdict:
        """Wait for a look-up that has this key; start one if none is under way."""
        future = self._looking.get(digest)
        if future is None:
            _, future = self._wanted.setdefault(digest, (key, asyncio.get_running_loop().create_future()))
        if self._lookup is None:
            self._lookup = asyncio.create_task(self._look_up_all())
        return await asyncio.shield(future)  # one who leaves doesn't take it from the others

    async def _look_up_all(self) -> None:
        """Look up what is wanted, in rounds, until nothing is; a failure ends it for all who wait."""
        error = AuthUnavailable("keys can't be checked just now: the look-up ended")
        try:
            while self._wanted:
                await self._look_up_round()
        except AWAY as cause:
            error = AuthUnavailable(f"keys can't be checked just now: {type(cause).__name__}")
        finally:
            left = [*self._looking.values(), *(future for _, future in self._wanted.values())]
            self._looking, self._wanted, self._lookup = {}, {}, None
            for future in left:
                _fail(future, error)

    async def _look_up_round(self) -> None:
        wanted = [(digest, *self._wanted.pop(digest)) for digest in list(islice(self._wanted, LOOKUP_KEYS))]
        self._looking = {digest: future for digest, _, future in wanted}
        ids = [key.id for _, key, _ in wanted]
        generation = self._generation
        found = await within(self._pool, LOOKUP_S, lambda database: queries.all_stored_keys(database, ids))
        rows = {stored.key.id: stored for stored in found}
        for digest, key, future in wanted:
            verdict = _judge(key, digest, rows.get(key.id), self._clock())
            if generation == self._generation:
                self._keep(key, digest, verdict)
            if not future.done():
                future.set_result(verdict)
        self._looking = {}

    def _keep(self, key: KeyText, digest: bytes, verdict: _Verdict) -> None:
        if isinstance(verdict, _Refused):
            self._known.pop(digest, None)
            self._refused[digest] = verdict
            self._refused.move_to_end(digest)
            if len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)
            return
        self._refused.pop(digest, None)
        self._known[digest] = verdict
        self._known.move_to_end(digest)
        self._digests[key.id] = digest
        if len(self._known) > KNOWN_MAX:
            _, oldest = self._known.popitem(last=False)
            del self._digests[oldest.caller.key]


def _judge(key: KeyText, digest: bytes, stored: queries.StoredKey | None, now: float) -> _Verdict:
    """What a row says about a key; `None` is compared too, so that an unknown id takes as long as a wrong secret."""
    same = keys.matches(stored.hmac if stored else bytes(len(digest)), digest)
    until = now + REFUSED_S
    if stored is None or not same or (stored.key.workspace is None) != (key.kind is KeyKind.OPERATOR):
        return _Refused(_UNKNOWN, until)
    if stored.key.revoked_at is not None:
        return _Refused("this API key was revoked", until)
    if stored.disabled:
        return _Refused(f"workspace {stored.key.workspace} is disabled", until)
    expires_at = math.inf if stored.key.expires_at is None else stored.key.expires_at
    return _Known(Caller(stored.key.id, stored.key.workspace), expires_at, now)


def _fail(future: asyncio.Future[_Verdict], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may have left
