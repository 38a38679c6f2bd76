"""The writing side of the ledger in one gateway: open rows before a client sees a byte, one final event after.

One task (`run`) owns everything: it holds one connection of the pool and commits in groups. Whatever arrives while a
commit is under way shares the next one, and a commit begins 1 ms after the one before began at the earliest, so an idle
gateway waits for nothing and a busy one shares each fsync among many. All that the task writes may be written twice
without harm (the rules are in `queries.ledger`), so whatever failed or may have failed is simply written again.

What a caller does: `open(row)` and wait; then, whatever happens, `close(row)` exactly once for each attempt. A close
with `final=False` opens the next attempt in the same commit; `open` of that attempt only waits for it, and it must be
closed like any other even if that wait failed.

Postgres away:
- An open waits two to four seconds for it to come back and is then refused (`LedgerUnavailable`): its client must see
  nothing. If its row was sent and the connection broke before the answer, nobody knows whether it is there. Within its
  time it is written again (there is a primary key); after that it is remembered as refused, and the audit removes it.
- A close is kept until Postgres takes it. Beyond `BACKLOG_MAX` of them it is dropped: logged with its ids, counted in
  `dropped`, its open row left for the reaper by the audit, which closes it from the engine book.
- The audit compares this gateway's open rows in the database with what it answers for: after every failure, every half
  minute and before it leaves. It removes what was refused and leaves to the reaper what isn't known here.

The lease in `instance` is extended each second, and always before opens are written, so no open row stands under a dead
lease while this process writes. If it is cut off for longer than the lease, the reaper closes its requests as
`gateway_lost`; when it comes back, its own closes supersede that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import asyncpg
import msgspec
import structlog
from asyncpg.pool import PoolConnectionProxy

from tenants import queries
from tenants.entries import COMMIT_S, Entry, bounded, clean, fail, lost, resolve, write
from tenants.errors import LedgerUnavailable
from tenants.queries import Attempt, Closing
from tenants.queries.database import AWAY, Connection, discard, give_back
from tenants.usage import UsageClose, UsageOpen

LEASE_S: Final = 10.0
EXTEND_S: Final = 1.0
COALESCE_S: Final = 0.001
BATCH: Final = 500
OPENS_MAX: Final = 10_000
BACKLOG_MAX: Final = 50_000
AUDIT_S: Final = 30.0
REMEMBER_REFUSED_S: Final = 120.0
RETRY_S: Final = (0.02, 0.5)

log = structlog.get_logger()


class Ledger:
    """Makes opens and closes durable; owned by one event loop. `run` does the work, from before the first `open`."""

    def __init__(
        self,
        pool: asyncpg.Pool[Any],
        instance: str,
        *,
        kind: str = "gateway",
        pid: int | None = None,
        clock: Callable[[], float] = time.time,
        lease_s: float = LEASE_S,
        backlog_max: int = BACKLOG_MAX,
    ) -> None:
        """`instance` is the UUID of this process; `clock` gives seconds since the epoch. One connection is kept."""
        self.dropped = 0
        """Closes that were given up because too many waited."""
        self._pool = pool
        self._instance = instance
        self._kind = kind
        self._pid = os.getpid() if pid is None else pid
        self._clock = clock
        self._lease_s = lease_s
        self._backlog_max = backlog_max
        self._live: dict[Attempt, Entry] = {}
        self._opens: deque[Entry] = deque()
        self._closes: deque[Entry] = deque()
        self._refused: dict[Attempt, float] = {}
        """Refused though the row may be in the database: until when on the loop's clock to remember it."""
        self._work = asyncio.Event()
        self._draining = False
        self._left = asyncio.Event()
        self._stopped = False
        self._connection: PoolConnectionProxy[Any] | None = None
        self._began_at = self._extended_at = self._audit_at = float("-inf")
        self._away_since: float | None = None
        self._retry_s = RETRY_S[0]

    @property
    def backlog(self) -> int:
        """Closes that wait to be taken."""
        return len(self._closes)

    @property
    def available(self) -> bool:
        """Did the last commit work?"""
        return self._away_since is None

    def open(self, row: UsageOpen) -> asyncio.Future[None]:
        """Make an accepted request durable; the future resolves when it is, or fails with `LedgerUnavailable`."""
        loop = asyncio.get_running_loop()
        attempt = (row.request_id, row.attempt)
        entry = self._live.get(attempt)
        if entry is not None and entry.opened is not None:
            return entry.opened
        future = loop.create_future()
        if self._stopped or (entry is None and len(self._opens) >= OPENS_MAX):
            fail(future, LedgerUnavailable("too many requests wait to be recorded"))
        elif entry is not None and entry.durable:
            future.set_result(None)
        else:
            if entry is None:
                entry = self._live[attempt] = Entry(row)
                self._opens.append(entry)
            entry.opened = future
            entry.deadline = loop.time() + COMMIT_S
            self._work.set()
        return future

    def close(self, row: UsageClose) -> asyncio.Future[None]:
        """Record how an attempt ended; the future resolves once it is durable. Never raises, waits for nothing.

        Closing what was refused, or closing again, does nothing. With `final`, `source=None` leaves the tokens to the
        reaper. The future fails with `LedgerUnavailable` only if the close had to be dropped.
        """
        entry = self._live.get((row.request_id, row.attempt))
        if entry is not None and entry.closed is not None:
            return entry.closed
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if entry is None:
            future.set_result(None)
            return future
        if self._stopped:
            fail(future, LedgerUnavailable("this gateway's ledger has stopped"))
            return future
        entry.close, entry.closed = clean(row), future
        if not row.final:
            entry.next = Entry(msgspec.structs.replace(entry.open, attempt=row.attempt + 1), follows=True)
            self._live[entry.next.attempt] = entry.next
        if entry.durable:
            self._enqueue_close(entry)
        return future

    async def run(self) -> None:
        """Commit until `drain` is through or this is cancelled."""
        try:
            while not self._left.is_set():
                await self._work_arrives()
                try:
                    await self._commit()
                except AWAY as error:
                    await self._failed(error)
        finally:
            self._stop()
            if self._connection is not None:
                await give_back(self._pool, self._connection)

    async def drain(self, timeout_s: float) -> int:
        """Wait until all is closed and durable, then take this instance off the list; how many attempts are left?

        What is left at the end of the time stays with the lease, which ends by itself: the reaper closes it.
        """
        self._draining = True
        self._work.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._left.wait()
        return len(self._live)

    # The task ------------------------------------------------------------------------------------------------------

    async def _work_arrives(self) -> None:
        """Until there is something to commit or a lease to extend, and 1 ms has passed since the last commit began."""
        loop = asyncio.get_running_loop()
        if not (self._opens or self._closes or (self._draining and not self._live)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._extended_at + EXTEND_S):
                    await self._work.wait()
        pause = self._began_at + COALESCE_S - loop.time()
        await asyncio.sleep(max(pause, 0.0))  # at least a turn of the loop: who comes together goes together
        self._work.clear()
        self._began_at = loop.time()

    async def _commit(self) -> None:
        """One round: lease, opens, closes, now and then the audit. Raises one of `AWAY`."""
        loop = asyncio.get_running_loop()
        if self._connection is None:
            self._connection = await self._pool.acquire(timeout=COMMIT_S)
        connection = self._connection
        if loop.time() >= self._extended_at + EXTEND_S:
            await bounded(
                queries.extend_lease(connection, self._instance, kind=self._kind, pid=self._pid, lease_s=self._lease_s)
            )
            self._extended_at = loop.time()
        if self._opens or self._closes:
            await self._commit_rows(connection)
        if loop.time() >= self._audit_at:
            await self._audit(connection)
        if self._draining and not self._live:
            await self._leave(connection)
        self._retry_s = RETRY_S[0]
        if self._away_since is not None:
            log.info("ledger_back", away_s=round(loop.time() - self._away_since, 3), backlog=len(self._closes))
            self._away_since = None

    async def _commit_rows(self, connection: Connection) -> None:
        """Write opens and events in one statement, so that they share an fsync; then what is left to the reaper."""
        opens, closes = list(islice(self._opens, BATCH)), list(islice(self._closes, BATCH))
        events = [entry for entry in closes if entry.closing.close.source is not None]
        pending = [entry for entry in closes if entry.closing.close.source is None]
        settled: set[Attempt] = set()
        for entry in opens:
            entry.sent = True

        async def write_rows(entries: Sequence[Entry]) -> None:
            rows = [entry.open for entry in entries if not entry.durable]
            closings = [entry.closing for entry in entries if entry.durable]
            if closings:
                settled.update(await queries.all_usage_close(connection, closings, rows))
            else:
                await queries.all_usage_open(connection, rows)

        async def write_pending(entries: Sequence[Entry]) -> None:
            await queries.all_usage_pending(connection, [entry.closing for entry in entries])
            settled.update(entry.attempt for entry in entries)

        poison = await write([*opens, *events], write_rows) if opens or events else {}
        self._opens_written(opens, poison)
        poison |= await write(pending, write_pending) if pending else {}
        self._closes_written(closes, settled, poison)

    async def _audit(self, connection: Connection) -> None:
        """Set right what this gateway has open in the database and doesn't answer for."""
        loop = asyncio.get_running_loop()
        self._refused = {attempt: until for attempt, until in self._refused.items() if until > loop.time()}
        rows = await bounded(queries.all_usage_of_gateway(connection, self._instance))
        strange = [row for row in rows if (row.request_id, row.attempt) not in self._live]
        refused = [(row.request_id, row.attempt) for row in strange if (row.request_id, row.attempt) in self._refused]
        unknown = [row for row in strange if (row.request_id, row.attempt) not in self._refused]
        if refused:
            await bounded(queries.all_usage_withdraw(connection, refused))
        if unknown:
            now = self._clock()
            await bounded(queries.all_usage_pending(connection, [Closing(row, lost(row, now)) for row in unknown]))
            log.warning(
                "ledger_left_to_reaper", requests=[str(row.request_id) for row in unknown[:20]], count=len(unknown)
            )
        self._audit_at = loop.time() + AUDIT_S

    async def _leave(self, connection: Connection) -> None:
        await self._audit(connection)
        if not self._live and await bounded(queries.remove_instance(connection, self._instance)):
            self._left.set()

    async def _failed(self, error: BaseException) -> None:
        """Cut the connection, refuse opens whose time is over, and wait a little."""
        now = asyncio.get_running_loop().time()
        if self._connection is not None:
            discard(self._connection)
            self._connection = None
        if self._away_since is None:
            self._away_since = now
            log.warning("ledger_away", error=type(error).__name__, opens=len(self._opens), backlog=len(self._closes))
        self._audit_at = now
        for entry in [entry for entry in self._live.values() if entry.opened is not None and entry.deadline <= now]:
            self._refuse(entry, "the ledger can't be written just now")
        self._opens = deque(entry for entry in self._opens if entry.attempt in self._live)
        await asyncio.sleep(self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_S[1])

    # What happens to an entry ----------------------------------------------------------------------------------------

    def _opens_written(self, batch: Sequence[Entry], poison: Mapping[Entry, str]) -> None:
        for entry in batch:
            self._opens.popleft()
            if entry in poison:
                log.error("ledger_open_impossible", request_id=str(entry.open.request_id), error=poison[entry])
                self._refuse(entry, "this request can't be recorded")
            else:
                self._made_durable(entry)

    def _closes_written(
        self, batch: Sequence[Entry], settled: Collection[Attempt], poison: Mapping[Entry, str]
    ) -> None:
        for entry in batch:
            self._closes.popleft()
            if entry in poison:
                self._drop(entry, poison[entry])
            elif entry.attempt in settled:
                self._settled(entry)
            else:  # it met another closer in the middle of a commit
                self._closes.append(entry)

    def _made_durable(self, entry: Entry) -> None:
        entry.durable = True
        if entry.opened is not None:
            resolve(entry.opened)
            entry.opened = None
        if entry.close is not None:
            self._enqueue_close(entry)

    def _enqueue_close(self, entry: Entry) -> None:
        if (
            len(self._closes) >= self._backlog_max and entry.next is None
        ):  # what opens the next attempt is never dropped
            self._drop(entry, "too many closes wait")
            return
        self._closes.append(entry)
        self._work.set()

    def _settled(self, entry: Entry) -> None:
        del self._live[entry.attempt]
        if entry.closed is not None:
            resolve(entry.closed)
        if entry.next is not None:
            self._made_durable(entry.next)

    def _refuse(self, entry: Entry, reason: str) -> None:
        """Fail a waiting open. The request is forgotten, unless it was accepted before: then it can still be closed."""
        if entry.opened is not None:
            fail(entry.opened, LedgerUnavailable(reason))
            entry.opened = None
        if entry.follows:
            return
        if entry.sent:
            self._refused[entry.attempt] = asyncio.get_running_loop().time() + REMEMBER_REFUSED_S
        self._forget(entry, reason)

    def _drop(self, entry: Entry, reason: str) -> None:
        """Give a close up: its open row stays, and the audit leaves it to the reaper."""
        self.dropped += 1
        self._audit_at = float("-inf")
        log.error(
            "ledger_close_dropped", request_id=str(entry.open.request_id), attempt=entry.open.attempt, reason=reason
        )
        if entry.closed is not None:
            fail(entry.closed, LedgerUnavailable(reason))
        self._forget(entry, reason)

    def _forget(self, entry: Entry, reason: str) -> None:
        """Answer no more for an attempt and those that would follow it: there is nothing to open or close."""
        following: Entry | None = entry
        while following is not None:
            self._live.pop(following.attempt, None)
            if following.opened is not None:
                fail(following.opened, LedgerUnavailable(reason))
            if following.closed is not None:
                resolve(following.closed)
            following = following.next

    def _stop(self) -> None:
        """Nothing is written any more: whoever waits hears of it."""
        self._stopped = True
        for entry in self._live.values():
            for future in (entry.opened, entry.closed):
                if future is not None:
                    fail(future, LedgerUnavailable("this gateway's ledger has stopped"))
