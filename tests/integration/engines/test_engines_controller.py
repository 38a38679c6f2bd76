"""The controller on a real Postgres, with scripted engines and time that passes when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import pytest
from deciding import GB, device, report, variant
from msgspec import Struct
from msgspec.structs import replace
from uuid_utils import uuid7

from engines import queries
from engines.controller import Controller
from engines.errors import LeadershipLost
from engines.launchers.memory import Behaviour, ManualTime, MemoryLauncher, MemoryNode, steady
from engines.model import Demand, Engine, EngineId, EngineState, Fleet, PoolDemand, Variant

S = EngineState
Pool: TypeAlias = "asyncpg.Pool[Any]"
BOT = variant("a", idle_timeout_s=60.0)
POOL = BOT.spec.pool


class Settings(Struct, frozen=True):
    tick_s: float = 0.01
    stop_grace_s: float = 3.0
    max_engines_per_pool: int = 4
    backoff_s: float = 2.0
    backoff_max_s: float = 300.0


class Machine:
    """A node, a clock, and what has been published; controllers come and go."""

    def __init__(self, pool: Pool, behaviour: Callable[[Engine], Behaviour] | None = None) -> None:
        self.pool = pool
        self.time = ManualTime()
        self.node = MemoryNode([device(4 * GB)], behaviour=behaviour or steady(2.0))
        self.fleets: list[Fleet] = []
        self.busy: dict[EngineId, int | None] = {}
        self.publishing: list[BaseException] = []
        self._published = asyncio.Condition()
        self.variants: tuple[Variant, ...] = (BOT,)
        self.controller: Controller
        self.launcher: MemoryLauncher

    @asynccontextmanager
    async def leading(self, *, leave: bool = True) -> AsyncIterator[Controller]:
        """A new controller for as long as the block lasts; its engines live on."""
        epoch = await queries.raise_epoch(self.pool)
        self.launcher = MemoryLauncher(self.node, time=self.time)
        self.controller = Controller(
            database=self.pool,
            launcher=self.launcher,
            publish=self._publish,
            in_flight=self._in_flight,
            settings=Settings(),
            epoch=epoch,
            clock=self.time.now,
        )
        self.controller.catalog_changed(self.variants)
        running = asyncio.create_task(self.controller.run())
        try:
            yield self.controller
            if leave:
                await self.controller.shutdown(stop_engines=False)
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _publish(self, fleet: Fleet) -> None:
        if self.publishing:
            raise self.publishing.pop()
        async with self._published:
            self.fleets.append(fleet)
            self._published.notify_all()

    async def _in_flight(self, engine: Engine) -> int | None:
        return self.busy.get(engine.id, 0)

    async def until(self, *states: EngineState, epoch: int | None = None) -> tuple[Engine, ...]:
        """Wait for a fleet whose engines are in these states."""

        def found() -> bool:
            last = self.fleets[-1] if self.fleets else None
            return (
                last is not None
                and sorted(e.state for e in last.engines) == sorted(states)
                and epoch in {None, last.epoch}
            )

        async with asyncio.timeout(10), self._published:
            await self._published.wait_for(found)
            return self.fleets[-1].engines

    def demand(self, *, engines: dict[EngineId, int] | None = None, version: int = 10**6, **fields: Any) -> None:
        """A gateway reports that it has seen everything, and what it wants of the pool."""
        told = PoolDemand(**({"last_used_at": self.time.now(), "idle_timeout_s": 60.0} | fields))
        demand: Demand = report(
            at=self.time.now(), epoch=10**6, version=version, pools={POOL: told}, engines=engines or {}
        )
        self.controller.demand_received(demand)

    async def ready(self) -> Engine:
        """One request has made one engine ready."""
        self.demand(waiting=1, caused_by="acme/bot")
        await self.until(S.STARTING)
        self.time.advance(2.0)
        (engine,) = await self.until(S.READY)
        self.demand(waiting=0)
        return engine


@pytest.fixture
def machine(db_pool: Pool) -> Machine:
    return Machine(db_pool)


async def history(pool: Pool, engine: EngineId) -> list[EngineState]:
    """An engine's states; checks that its intervals have no gap and that only a finished one has ended."""
    intervals = await queries.engine_intervals(pool, engine)
    assert [i.ended_at for i in intervals[:-1]] == [i.started_at for i in intervals[1:]]
    assert (intervals[-1].ended_at is not None) == (intervals[-1].state is S.STOPPED)
    return [i.state for i in intervals]


async def stored(pool: Pool) -> list[EngineState]:
    return [engine.state for engine in await queries.live_engines(pool)]


async def test_a_hold_starts_an_engine_that_leaves_when_it_is_idle(machine: Machine) -> None:
    async with machine.leading():
        engine = await machine.ready()
        assert machine.node.running == {engine.id}
        assert (engine.caused_by, engine.ready_at) == ("acme/bot", machine.time.now())
        assert machine.fleets[-1].pools[0].start_s == 2.0
        machine.time.advance(60.0)
        await machine.until()
        assert machine.node.present == frozenset()
    assert await history(machine.pool, engine.id) == [
        S.PLACED,
        S.STARTING,
        S.READY,
        S.DRAINING,
        S.STOPPING,
        S.STOPPED,
    ]


async def test_i6_fifty_reports_of_holds_cause_one_start(machine: Machine) -> None:
    async with machine.leading():
        for waiting in range(1, 51):
            machine.demand(waiting=waiting)
        await machine.until(S.STARTING)
        machine.time.advance(2.0)
        await machine.until(S.READY)
    assert len(await queries.engine_records(machine.pool, stopped=True)) == 1


async def test_i3_an_engine_that_says_it_is_busy_is_asked_until_it_is_not(machine: Machine) -> None:
    async with machine.leading() as controller:
        engine = await machine.ready()
        machine.busy[engine.id] = 3  # left by a gateway that died
        machine.time.advance(6.0)
        controller.stop_engine(engine.id)
        await machine.until(S.DRAINING)
        await asyncio.sleep(0.1)
        assert await stored(machine.pool) == [S.DRAINING]
        machine.busy[engine.id] = None
        await machine.until()


async def test_i3_an_engine_drains_until_each_gateway_has_seen_it_and_let_go(machine: Machine) -> None:
    async with machine.leading() as controller:
        engine = await machine.ready()
        machine.time.advance(6.0)
        machine.demand(running=1, engines={engine.id: 1})
        controller.stop_engine(engine.id)
        await machine.until(S.DRAINING)
        await asyncio.sleep(0.1)
        assert await stored(machine.pool) == [S.DRAINING]
        machine.time.advance(0.1)
        machine.demand()
        await machine.until()


async def test_force_does_not_wait(machine: Machine) -> None:
    async with machine.leading() as controller:
        engine = await machine.ready()
        machine.demand(running=1, engines={engine.id: 1})
        controller.stop_engine(engine.id, force=True)
        await machine.until()
    assert await history(machine.pool, engine.id) == [
        S.PLACED,
        S.STARTING,
        S.READY,
        S.DRAINING,
        S.STOPPING,
        S.STOPPED,
    ]


async def test_a_failed_start_is_stored_with_its_last_lines_and_tried_again_later(db_pool: Pool) -> None:
    script = iter([Behaviour(fails="exit status 1", last_lines=("a", "b")), Behaviour(start_s=1.0)])
    machine = Machine(db_pool, lambda _: next(script))
    async with machine.leading():
        machine.demand(waiting=1)
        (engine,) = await machine.until(S.STARTING)
        machine.time.advance(1.0)
        await machine.until()
        failure = machine.fleets[-1].pools[0].failure
        assert failure is not None
        assert (failure.failures, failure.retry_at - machine.time.now()) == (1, 2.0)
        record = await queries.engine_record(db_pool, engine.id)
        assert record is not None
        assert (record.engine.failure, record.last_lines) == ("exit status 1", ("a", "b"))
        assert await history(db_pool, engine.id) == [S.PLACED, S.STARTING, S.FAILED, S.STOPPED]
        machine.time.advance(2.0)
        machine.demand(waiting=1)
        await machine.until(S.STARTING)
        machine.time.advance(1.0)
        await machine.until(S.READY)
        assert machine.fleets[-1].pools[0].failure is None


async def test_a_refused_start_ends_without_a_process(db_pool: Pool) -> None:
    machine = Machine(db_pool, lambda _: Behaviour(refused="no", last_lines=("why",)))
    async with machine.leading():
        machine.demand(waiting=1)
        async with asyncio.timeout(10):
            while not any(pool.failure for fleet in machine.fleets for pool in fleet.pools):
                await asyncio.sleep(0.01)
    (record,) = await queries.engine_records(db_pool, stopped=True)
    assert (record.engine.failure, record.last_lines) == ("no", ("why",))
    assert await history(db_pool, record.engine.id) == [S.PLACED, S.STOPPED]


async def test_an_engine_that_dies_while_ready_is_replaced_when_it_is_wanted(machine: Machine) -> None:
    async with machine.leading():
        engine = await machine.ready()
        machine.launcher.kill(engine.id)
        await machine.until()
        machine.time.advance(1.0)
        second = await machine.ready()
        assert second.id != engine.id
    record = await queries.engine_record(machine.pool, engine.id)
    assert record is not None
    assert record.engine.failure == "killed by SIGKILL"


async def test_provisioned_engines_are_ready_without_any_request(machine: Machine) -> None:
    machine.variants = (variant("a", provisioned=17),)
    async with machine.leading():
        await machine.until(S.STARTING, S.STARTING)
        machine.time.advance(2.0)
        await machine.until(S.READY, S.READY)
        machine.time.advance(10_000.0)
        await asyncio.sleep(0.1)
        assert await stored(machine.pool) == [S.READY, S.READY]


async def test_a_prewarmed_pool_has_an_engine(machine: Machine) -> None:
    async with machine.leading() as controller:
        controller.prewarm(POOL)
        await machine.until(S.STARTING)


async def test_a_deleted_variant_takes_its_engine_along(machine: Machine) -> None:
    async with machine.leading() as controller:
        await machine.ready()
        machine.time.advance(6.0)
        controller.catalog_changed(())
        await machine.until()


async def test_a_fleet_that_could_not_be_published_is_published_next_round(machine: Machine) -> None:
    machine.publishing = [TimeoutError(), OSError()]
    async with machine.leading():
        await machine.until()
        await machine.ready()


# Controllers that come and go


async def test_i10_a_new_controller_adopts_what_lives_and_no_engine_restarts(machine: Machine) -> None:
    async with machine.leading():
        engine = await machine.ready()
    async with machine.leading():
        (adopted,) = await machine.until(S.READY, epoch=2)
        assert (adopted.id, adopted.pid) == (engine.id, engine.pid)
        assert machine.fleets[-1].pools[0].start_s == 2.0
        machine.time.advance(6.0)
        machine.demand(last_used_at=machine.time.now())
        machine.time.advance(60.0)
        await machine.until()
    assert (await history(machine.pool, engine.id))[-1] is S.STOPPED


async def test_i10_a_start_under_way_is_watched_by_the_next_controller(machine: Machine) -> None:
    async with machine.leading():
        machine.demand(waiting=1)
        (engine,) = await machine.until(S.STARTING)
    async with machine.leading():
        await machine.until(S.STARTING, epoch=2)
        machine.time.advance(2.0)
        (ready,) = await machine.until(S.READY)
        assert ready.id == engine.id


async def test_i10_what_died_while_nobody_led_is_buried(machine: Machine) -> None:
    async with machine.leading():
        engine = await machine.ready()
    machine.node.kill(engine.id, machine.time.now())
    machine.node.due(machine.time.now())
    async with machine.leading():
        await machine.until(epoch=2)
    assert (await history(machine.pool, engine.id))[-2:] == [S.FAILED, S.STOPPED]
    assert machine.node.present == frozenset()


async def test_i10_what_was_placed_and_never_started_is_over(machine: Machine) -> None:
    async with machine.leading():
        engine = await machine.ready()
    other = replace(engine, id=EngineId(str(uuid7())), state=S.PLACED, epoch=1)
    await queries.place_engine(machine.pool, other)
    async with machine.leading():
        await machine.until(S.READY, epoch=2)
    states = [r.engine.state for r in await queries.engine_records(machine.pool, stopped=True)]
    assert sorted(states) == [S.READY, S.STOPPED]


@pytest.mark.parametrize("until", [S.DRAINING, S.STOPPING])
async def test_i10_an_end_under_way_is_brought_about_by_the_next_controller(db_pool: Pool, until: EngineState) -> None:
    machine = Machine(db_pool, steady(2.0, stop_s=1.0))
    async with machine.leading() as controller:
        engine = await machine.ready()
        machine.busy[engine.id] = 1 if until is S.DRAINING else 0
        machine.time.advance(6.0)
        controller.stop_engine(engine.id)
        await machine.until(until)
    machine.busy.clear()
    async with machine.leading():
        await machine.until(until, epoch=2)
        machine.time.advance(6.0)
        if until is S.DRAINING:
            await machine.until(S.STOPPING)
            machine.time.advance(1.0)
        await machine.until()
    assert machine.node.present == frozenset()


async def test_a_controller_that_was_replaced_stops_deciding(machine: Machine) -> None:
    with pytest.raises(LeadershipLost):
        async with machine.leading(leave=False):
            await machine.until()
            await queries.raise_epoch(machine.pool)
            machine.demand(waiting=1)
    assert await stored(machine.pool) == []
    assert machine.node.present == frozenset()


# Shutdown


async def test_a_shutdown_leaves_no_engine(machine: Machine) -> None:
    async with machine.leading(leave=False) as controller:
        await machine.ready()
        await controller.shutdown(stop_engines=True)
    assert await stored(machine.pool) == []
    assert machine.node.present == frozenset()
    assert machine.fleets[-1].engines == ()


async def test_a_shutdown_ends_engines_that_are_starting(machine: Machine) -> None:
    async with machine.leading(leave=False) as controller:
        machine.demand(waiting=1)
        await machine.until(S.STARTING)
        await controller.shutdown(stop_engines=True)
    assert machine.node.present == frozenset()


async def test_a_shutdown_waits_for_streams_no_longer_than_it_may(machine: Machine) -> None:
    async with machine.leading(leave=False) as controller:
        engine = await machine.ready()
        machine.demand(running=1, engines={engine.id: 1})
        ending = asyncio.create_task(controller.shutdown(stop_engines=True, drain_s=4.0))
        await machine.until(S.DRAINING)
        await asyncio.sleep(0.1)
        assert not ending.done()
        machine.time.advance(4.0)
        await ending
    assert await stored(machine.pool) == []
