"""Admission: gives requests slots of engines, lets them wait, and says what is demanded.

One object a gateway, on its event loop; it owns the queues, the count of slots in use and the futures of those that
wait. What to do is decided by the pure `waiting` and `routing`; here it is done. Everything but `admit` is a plain
call, so a fleet is taken over in one tick: from the moment `fleet_changed` returns, nothing is sent to an engine that
is not READY in it, and only then does `collect` acknowledge it.

Who is granted slots owns them and must `release` them; releasing is synchronous and may be repeated.

A hold ends by a grant, by its deadline (`HoldExpired`), by its caller being cancelled (the place is free at once), at
once when the pool's last start failed and no other is under way (`LoadFailed`), or by `close` (`AdmissionClosed`). A
pool that is blocked keeps its holds until their deadline.

Durations and deadlines are on the loop's clock; `clock` gives the time of day for what is reported.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from engines.errors import AdmissionClosed, HoldExpired, LoadFailed, QueueFull
from engines.lifecycle import SERVING
from engines.model import (
    Demand,
    Engine,
    EngineId,
    EngineState,
    Fleet,
    GatewayId,
    PoolFailure,
    PoolId,
    PoolStatus,
    Variant,
)
from engines.poolview import Availability, PoolView
from engines.routing import candidates
from engines.waiting import Hold, Queue

DOUBT_S: Final = 0.25
"""Between two looks at an engine that failed a request."""
LONGEST_RETRY_S: Final = 60.0
"""No caller is told to wait longer: clients ignore longer waits or give up at them."""


@dataclass(slots=True)
class Waited:
    """How long a request has waited for slots; filled in however the waiting ends."""

    queued_us: int = 0
    """From asking until having them, or until the waiting was over."""
    held_us: int = 0
    """Of that, while no engine of the pool was ready."""

    @property
    def cold(self) -> bool:
        """It held for the start of an engine."""
        return self.held_us > 0


class Grant:
    """Slots of an engine; whoever has it calls `release` when the engine is done with the request."""

    __slots__ = ("_release", "engine")

    def __init__(self, engine: Engine, release: Callable[[], None]) -> None:
        self.engine = engine
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the slots back; the next in the queue gets them. Repeating it does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


@dataclass(slots=True)
class _Waiter:
    hold: Hold
    grant: asyncio.Future[Grant]


class Admission:
    """The slots and queues of one gateway."""

    def __init__(
        self,
        gateway: GatewayId,
        *,
        queue_length: int,
        poke: Callable[[], None],
        healthy: Callable[[Engine], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        """`poke` asks for a demand report soon; `healthy` asks an engine; `clock` gives seconds since the epoch."""
        self._gateway = gateway
        self._queue_length = queue_length
        self._poke = poke
        self._healthy = healthy
        self._clock = clock
        self._pools: dict[PoolId, PoolView] = {}
        self._statuses: dict[PoolId, PoolStatus] = {}
        self._used: dict[EngineId, int] = {}
        self._requests: dict[EngineId, int] = {}
        self._suspects: dict[EngineId, asyncio.Task[None]] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self.fleet: Fleet | None = None
        """The newest fleet, which routing already follows."""

    # ------------------------------------------------------------------ asking

    async def admit(self, variant: Variant, *, slots: int, wait_s: float, waited: Waited) -> Grant:
        """Have `slots` slots of an engine that serves `variant`, waiting up to `wait_s` for them.

        Raises one of `NotAdmitted`. `slots` is at most what one engine has. `waited` is filled in, also when this
        raises or is cancelled.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        pool = self._pool(variant.spec.pool, since)
        unready_before_s = pool.unready_s(since)
        waiter = self._arrive(pool, variant, slots, since + wait_s)
        try:
            if waiter.grant.done():
                return waiter.grant.result()
            self._poke()
            return await asyncio.shield(waiter.grant)  # who is cancelled may be granted slots in the same tick
        except BaseException:
            self._abandon(pool, waiter)
            raise
        finally:
            now = loop.time()
            waited.queued_us = int((now - since) * 1e6)
            waited.held_us = int((pool.unready_s(now) - unready_before_s) * 1e6)

    def _arrive(self, pool: PoolView, variant: Variant, slots: int, deadline: float) -> _Waiter:
        name = f"{variant.workspace}/{variant.name}"
        if self._closed:
            raise _closed()
        pool.arrived(name, variant.scaling.idle_timeout_s, self._clock())
        failure = pool.failure(self._clock())
        if failure is not None:
            raise self._load_failed(failure)
        hold = Hold(id=next(self._numbers), variant=name, slots=slots, cap=variant.scaling.max_concurrency)
        if not pool.queue.enter(hold):
            waiting = len(pool.queue)
            raise QueueFull(f"{waiting} requests wait for this model already; ask again later", retry_s=1.0)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(hold, loop.create_future())
        self._waiters[hold.id] = waiter
        self._dispatch(pool)
        if not waiter.grant.done():
            timer = loop.call_at(deadline, self._expire, pool, hold)
            waiter.grant.add_done_callback(lambda _: timer.cancel())
        return waiter

    def _abandon(self, pool: PoolView, waiter: _Waiter) -> None:
        """The asker is gone; what it was just granted goes back."""
        if self._waiters.pop(waiter.hold.id, None) is not None:
            pool.queue.leave(waiter.hold.id)
            waiter.grant.cancel()
            self._dispatch(pool)  # it may have stood in the way of others
        elif waiter.grant.done() and not waiter.grant.cancelled() and waiter.grant.exception() is None:
            waiter.grant.result().release()

    # ------------------------------------------------------------------ granting

    def _dispatch(self, pool: PoolView) -> None:
        if not pool.queue or not pool.ready:
            return
        among = candidates(pool.engines, pool.id, self._used, self._suspects)
        by_id = {engine.id: engine for engine in pool.engines}
        for dispatch in pool.queue.next(among, pool.running):
            pool.queue.leave(dispatch.hold.id)
            waiter = self._waiters.pop(dispatch.hold.id)
            waiter.grant.set_result(self._take(pool, dispatch.hold, by_id[dispatch.engine]))

    def _take(self, pool: PoolView, hold: Hold, engine: Engine) -> Grant:
        self._used[engine.id] = self._used.get(engine.id, 0) + hold.slots
        self._requests[engine.id] = self._requests.get(engine.id, 0) + 1
        pool.began(hold)
        return Grant(engine, lambda: self._give_back(pool, hold, engine.id))

    def _give_back(self, pool: PoolView, hold: Hold, engine: EngineId) -> None:
        _subtract(self._used, engine, hold.slots)
        _subtract(self._requests, engine, 1)
        pool.ended(hold, self._clock())
        self._dispatch(pool)

    # ------------------------------------------------------------------ refusing

    def _load_failed(self, failure: PoolFailure) -> LoadFailed:
        wait_s = max(1.0, failure.retry_at - self._clock())
        times = "once" if failure.failures == 1 else f"{failure.failures} times in a row"
        message = f"the model could not be started ({times}): {failure.reason}; the next attempt is in {wait_s:.0f} s"
        return LoadFailed(message, retry_s=min(wait_s, LONGEST_RETRY_S))

    def _expire(self, pool: PoolView, hold: Hold) -> None:
        if hold.id in self._waiters:
            self._fail(pool, hold, self._too_late(pool))
            self._dispatch(pool)  # it may have stood in the way of others

    def _too_late(self, pool: PoolView) -> HoldExpired:
        if pool.ready:
            return HoldExpired("all slots of this model stayed taken; ask again", retry_s=1.0, loading=False)
        eta_s = pool.eta_s(self._clock())
        why = f" ({pool.blocked})" if pool.blocked else ""
        message = f"the model is still loading{why}; ask again in {eta_s:.0f} s"
        return HoldExpired(message, retry_s=min(eta_s, LONGEST_RETRY_S), loading=True)

    def _fail(self, pool: PoolView, hold: Hold, error: Exception) -> None:
        pool.queue.leave(hold.id)
        waiter = self._waiters.pop(hold.id)
        if not waiter.grant.done():
            waiter.grant.set_exception(error)

    def _fail_all(self, pool: PoolView, error: Callable[[], Exception]) -> None:
        for hold in pool.queue.holds:
            self._fail(pool, hold, error())

    # ------------------------------------------------------------------ the fleet

    def fleet_changed(self, fleet: Fleet) -> None:
        """Follow a newer fleet at once: routes, holds and what `collect` acknowledges."""
        now = asyncio.get_running_loop().time()
        self.fleet = fleet
        engines: dict[PoolId, list[Engine]] = {}
        for engine in fleet.engines:
            engines.setdefault(engine.pool, []).append(engine)
        self._statuses = {status.pool: status for status in fleet.pools}
        for pool_id in self._pools.keys() | engines.keys():
            pool = self._pool(pool_id, now)
            pool.update(engines.get(pool_id, ()), self._statuses.get(pool_id), now)
            failure = pool.failure(self._clock())
            if failure is not None:
                self._fail_all(pool, functools.partial(self._load_failed, failure))
            self._dispatch(pool)
        if any(engine.state is EngineState.DRAINING for engine in fleet.engines):
            self._poke()

    def suspect(self, engine: Engine) -> None:
        """Pass over an engine that failed a request, until it says that it is healthy or has left the fleet.

        A request that an engine can't digest does no harm to others this way: the first look clears the engine.
        """
        if engine.id not in self._suspects:
            self._suspects[engine.id] = asyncio.create_task(self._doubt(engine))

    async def _doubt(self, engine: Engine) -> None:
        try:
            while self._serves(engine):
                if await self._healthy(engine):
                    break
                await asyncio.sleep(DOUBT_S)
        finally:
            del self._suspects[engine.id]
        self._dispatch(self._pools[engine.pool])

    def _serves(self, engine: Engine) -> bool:
        pool = self._pools.get(engine.pool)
        return pool is not None and any(e.id == engine.id and e.state in SERVING for e in pool.engines)

    def close(self) -> None:
        """Take nothing more and end all holds; grants stay valid."""
        self._closed = True
        for pool in self._pools.values():
            self._fail_all(pool, _closed)
        for task in self._suspects.values():
            task.cancel()
        self._poke()

    # ------------------------------------------------------------------ telling

    def collect(self) -> Demand:
        """What this gateway has and wants, and the fleet that it follows."""
        return Demand(
            gateway=self._gateway,
            at=self._clock(),
            fleet_epoch=self.fleet.epoch if self.fleet is not None else 0,
            fleet_version=self.fleet.version if self.fleet is not None else 0,
            pools={pool.id: pool.demand() for pool in self._pools.values() if pool.arrivals},
            engines=dict(self._requests),
            leaving=self._closed,
        )

    def availability(self, pool_id: PoolId) -> tuple[Availability, float | None]:
        """What to expect of a pool, and in how many seconds it may be ready (`None`: can't be said)."""
        return self._pool(pool_id, asyncio.get_running_loop().time()).availability(self._clock())

    def waiting(self) -> int:
        """Requests that wait, over all pools."""
        return len(self._waiters)

    def running(self) -> int:
        """Requests at engines."""
        return sum(self._requests.values())

    def _pool(self, pool_id: PoolId, now: float) -> PoolView:
        pool = self._pools.get(pool_id)
        if pool is None:
            pool = self._pools[pool_id] = PoolView(pool_id, Queue(self._queue_length), unready_since=now)
            pool.status = self._statuses.get(pool_id)
        return pool


def _closed() -> AdmissionClosed:
    return AdmissionClosed("this gateway is shutting down; ask again", retry_s=1.0)


def _subtract(counts: dict[Any, int], key: Any, amount: int) -> None:
    left = counts[key] - amount
    if left:
        counts[key] = left
    else:
        del counts[key]
