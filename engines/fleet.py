"""The exchange between controller and gateways: the fleet goes out, demand comes in.

    controller                                             gateway
    FleetPublisher ── Valkey SET + PUBLISH ──────────────▶ FleetView
                   └─ Postgres fleet_snapshot + NOTIFY ──▶
    DemandInbox    ◀─ Valkey PUBLISH ───────────────────── DemandReporter
                   ◀─ Postgres demand_report + NOTIFY ──── (while Valkey is away or no controller hears it there)

Valkey is the quick way and may vanish, freeze or come back empty at any moment; Postgres is the sure one. The fleet
goes both ways always, since it changes rarely; demand is said again each half second, so nothing of it is kept in
Valkey. A reader takes whatever comes first and refuses what is not newer, by (epoch, version) of a fleet and by `at` of
a gateway's report, so it doesn't matter which way is quicker. Without either store a gateway goes on with the fleet
that it has.

NOTIFY arrives through `postgres_notified`, which the process' one listening connection calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import asyncpg
import msgspec
import structlog
from redis.asyncio import Redis

from engines import queries, valkey
from engines.model import Demand, Fleet, GatewayId

POLL_S: Final = 1.0
"""How often Postgres is read while Valkey is away."""
REPORT_S: Final = 0.5
"""Longest silence of a gateway."""
COALESCE_S: Final = 0.005
"""Holds that arrive within this time share one report."""
FRESH_S: Final = 5.0
"""A report older than this says nothing about its gateway any more."""
OVERTAKE_S: Final = 0.02
"""Head start of Valkey over Postgres, so that a change is not read from both."""
DATABASE_S: Final = 1.0
"""Longest wait for one statement."""

POSTGRES_AWAY: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

Pool: TypeAlias = "asyncpg.Pool[Any]"
T = TypeVar("T")

log = structlog.get_logger()


def fleet_channel(installation: str) -> str:
    """The channel, and the key, of the fleet in Valkey."""
    return f"greenroom:{installation}:fleet"


def demand_channel(installation: str) -> str:
    """The channel of demand in Valkey."""
    return f"greenroom:{installation}:demand"


class FleetPublisher:
    """The controller's side of the fleet. `pool` and `redis` stay the caller's."""

    def __init__(self, pool: Pool, redis: Redis, installation: str) -> None:
        self._pool = pool
        self._redis = redis
        self._channel = fleet_channel(installation)

    async def publish(self, fleet: Fleet) -> None:
        """Send a fleet both ways, within `DATABASE_S`. Raises one of `POSTGRES_AWAY` if Postgres did not take it."""
        _, failure = await asyncio.gather(
            self._through_valkey(msgspec.json.encode(fleet)),
            _in_time(queries.put_fleet(self._pool, fleet)),
            return_exceptions=True,
        )
        if isinstance(failure, BaseException):
            raise failure

    async def _through_valkey(self, body: bytes) -> None:
        with contextlib.suppress(*valkey.AWAY):
            await valkey.keep_and_publish(self._redis, self._channel, body)


class FleetView:
    """A gateway's side of the fleet: the newest that is known, and who wants to hear of newer ones."""

    def __init__(self, pool: Pool, redis: Redis, installation: str) -> None:
        self._pool = pool
        self._callbacks: list[Callable[[Fleet], None]] = []
        self._ways = _TwoWays(redis, fleet_channel(installation), kept=True, message=self._received, read=self._read)
        self.current: Fleet | None = None

    def subscribe(self, callback: Callable[[Fleet], None]) -> None:
        """Have `callback` called, on the event loop, with every fleet that is newer than the one before."""
        self._callbacks.append(callback)

    async def run(self) -> None:
        """Keep `current` up to date until cancelled."""
        await self._ways.run()

    def postgres_notified(self, payload: str) -> None:
        """The fleet of this `epoch.version` is in Postgres; an empty payload: something may be."""
        epoch, _, version = payload.partition(".")
        if not (epoch.isdecimal() and version.isdecimal() and (int(epoch), int(version)) <= self._known()):
            self._ways.look()

    def _known(self) -> tuple[int, int]:
        return (self.current.epoch, self.current.version) if self.current is not None else (-1, -1)

    def _received(self, body: bytes | str) -> None:
        self._take(msgspec.json.decode(body, type=Fleet))

    async def _read(self) -> None:
        fleet = await queries.fleet(self._pool)
        if fleet is not None:
            self._take(fleet)

    def _take(self, fleet: Fleet) -> None:
        if (fleet.epoch, fleet.version) <= self._known():
            return
        self.current = fleet
        for callback in self._callbacks:
            try:
                callback(fleet)
            except Exception:
                log.exception("fleet_callback_failed", epoch=fleet.epoch, version=fleet.version)


class DemandReporter:
    """A gateway's side of demand: sends what `collect` returns each half second, and soon after each `poke`."""

    def __init__(self, pool: Pool, redis: Redis, installation: str, collect: Callable[[], Demand]) -> None:
        self._pool = pool
        self._redis = redis
        self._channel = demand_channel(installation)
        self._collect = collect
        self._poked = asyncio.Event()
        self._valkey_lost = asyncio.Event()

    def poke(self) -> None:
        """Report soon: a hold has arrived or a fleet is to be acknowledged. Cheap; many in a row make one report."""
        self._poked.set()

    async def run(self) -> None:
        """Report until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report())
            group.create_task(self._win_valkey_back())

    async def leave(self) -> None:
        """Say, both ways, that nothing is in flight here and nothing will be. Call it after `run` has ended."""
        demand = msgspec.structs.replace(self._collect(), engines={}, leaving=True)
        await asyncio.gather(self._through_valkey(demand), self._through_postgres(demand))

    async def _report(self) -> NoReturn:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._poked.wait()
                    await asyncio.sleep(COALESCE_S)
            self._poked.clear()
            demand = self._collect()
            if self._valkey_lost.is_set() or not await self._through_valkey(demand):
                await self._through_postgres(demand)

    async def _win_valkey_back(self) -> NoReturn:
        while True:
            await self._valkey_lost.wait()
            wait_s = valkey.FIRST_WAIT_S
            while not await valkey.answers(self._redis):
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, valkey.LONGEST_WAIT_S)
            self._valkey_lost.clear()
            log.info("valkey_back", channel=self._channel)

    async def _through_valkey(self, demand: Demand) -> bool:
        """Whether a controller heard it."""
        try:
            return await valkey.publish(self._redis, self._channel, msgspec.json.encode(demand)) > 0
        except valkey.AWAY as error:
            log.warning("valkey_away", channel=self._channel, error=type(error).__name__)
            self._valkey_lost.set()
            return False

    async def _through_postgres(self, demand: Demand) -> None:
        try:
            await _in_time(queries.put_demand(self._pool, demand))
        except POSTGRES_AWAY as error:
            log.warning("demand_not_stored", error=type(error).__name__)


class DemandInbox:
    """The controller's side of demand: calls `receive` with each report, those of one gateway in order and once."""

    def __init__(self, pool: Pool, redis: Redis, installation: str, receive: Callable[[Demand], None]) -> None:
        self._pool = pool
        self._receive = receive
        self._newest: dict[GatewayId, float] = {}
        self._ways = _TwoWays(redis, demand_channel(installation), message=self._received, read=self._read)

    async def run(self) -> None:
        """Receive until cancelled."""
        await self._ways.run()

    def postgres_notified(self, payload: str) -> None:
        """A report of the gateway `payload` is in Postgres."""
        del payload  # all fresh reports are read at once: there are as many as gateways
        self._ways.look()

    def _received(self, body: bytes | str) -> None:
        self._take(msgspec.json.decode(body, type=Demand))

    async def _read(self) -> None:
        for demand in await queries.demands_since(self._pool, time.time() - FRESH_S):
            self._take(demand)

    def _take(self, demand: Demand) -> None:
        if demand.at <= self._newest.get(demand.gateway, float("-inf")):
            return
        self._newest[demand.gateway] = demand.at
        try:
            self._receive(demand)
        except Exception:
            log.exception("demand_not_received", gateway=demand.gateway)


class _TwoWays:
    """Follows a Valkey channel, and reads Postgres when told to and each `POLL_S` while the channel is down.

    `message` may raise `msgspec.DecodeError`, for a message that is then logged and dropped.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        kept: bool = False,
        message: Callable[[bytes | str], None],
        read: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """`kept`: the last message is kept in Valkey and comes first; `read` looks into Postgres."""
        self._redis = redis
        self._name = name
        self._kept = kept
        self._on_message = message
        self._read = read
        self._look = asyncio.Event()
        self._channel = valkey.Channel(redis, name, joined=self._joined, message=self._message, lost=self.look)

    def look(self) -> None:
        """Have Postgres read soon."""
        self._look.set()

    async def run(self) -> None:
        """Follow both until cancelled."""
        self.look()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._channel.run())
            group.create_task(self._watch_postgres())

    async def _joined(self) -> None:
        body = await valkey.kept(self._redis, self._name) if self._kept else None
        if body is not None:
            self._message(body)
        self.look()  # what came while the channel was down is in Postgres only

    def _message(self, body: bytes | str) -> None:
        try:
            self._on_message(body)
        except msgspec.DecodeError as error:
            log.error("message_unreadable", channel=self._name, error=str(error))

    async def _watch_postgres(self) -> NoReturn:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._channel.up else POLL_S):
                    await self._look.wait()
            if self._channel.up:
                await asyncio.sleep(OVERTAKE_S)
            self._look.clear()
            try:
                await _in_time(self._read())
            except (*POSTGRES_AWAY, msgspec.DecodeError) as error:
                log.warning("postgres_not_read", instead_of=self._name, error=type(error).__name__)
                await asyncio.sleep(POLL_S)
                self.look()


async def _in_time(statement: Coroutine[Any, Any, T]) -> T:
    """What the statement returns, or `TimeoutError` after `DATABASE_S`.

    It is left to end by itself then: giving its connection back can take as long as a frozen server likes.
    """
    task = asyncio.create_task(statement)
    try:
        done, _ = await asyncio.wait({task}, timeout=DATABASE_S)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TimeoutError(f"no answer from Postgres within {DATABASE_S} s")
    return task.result()
