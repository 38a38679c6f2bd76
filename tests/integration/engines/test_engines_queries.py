"""The SQL of `engines` on a real Postgres."""

from __future__ import annotations

import uuid
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest

from engines import queries
from engines.errors import LeadershipLost
from engines.lifecycle import transition
from engines.model import (
    Demand,
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    Fleet,
    GatewayId,
    ModelDigest,
    NodeId,
    PoolDemand,
    PoolId,
)

S = EngineState
Pool: TypeAlias = "asyncpg.Pool[Any]"
SPEC = EngineSpec(model_digest=ModelDigest("a" * 64))


def placed(number: int = 1, *, epoch: int = 1, at: float = 1000.0) -> Engine:
    return Engine(
        id=EngineId(str(uuid.UUID(int=number))),
        pool=SPEC.pool,
        spec=SPEC,
        state=S.PLACED,
        since=at,
        node=NodeId("here"),
        device=DeviceId("here/mem"),
        memory_bytes=10 << 30,
        epoch=epoch,
        created_at=at,
        caused_by="acme/bot",
    )


async def change(pool: Pool, engine: Engine, to: EngineState, at: float, epoch: int = 1, **fields: Any) -> Engine:
    after = msgspec.structs.replace(transition(engine, to, at), **fields)
    await queries.change_engine(pool, engine.state, after, epoch=epoch)
    return after


async def test_an_engine_comes_back_as_it_was_written(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    assert await queries.live_engines(db_pool) == (engine,)
    engine = await change(db_pool, engine, S.STARTING, 1000.5, address="/run/s", pid=7, pid_start=99)
    engine = await change(db_pool, engine, S.READY, 1002.25, ready_at=1002.25, phases_us={"fork": 3})
    assert await queries.live_engines(db_pool) == (engine,)
    assert await queries.start_times(db_pool) == {SPEC.pool: 2.25}


async def test_intervals_have_no_gap_and_end_with_a_stop_of_no_length(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    for at, state in ((1001.0, S.STARTING), (1002.0, S.READY), (1003.1, S.DRAINING), (1004.7, S.STOPPING)):
        engine = await change(db_pool, engine, state, at)
    engine = await change(db_pool, engine, S.STOPPED, 1005.0)
    intervals = await queries.engine_intervals(db_pool, engine.id)
    assert [i.state for i in intervals] == [S.PLACED, S.STARTING, S.READY, S.DRAINING, S.STOPPING, S.STOPPED]
    assert [i.seq for i in intervals] == list(range(6))
    assert [i.ended_at for i in intervals[:-1]] == [i.started_at for i in intervals[1:]]
    assert intervals[-1].started_at == intervals[-1].ended_at == 1005.0
    assert [i.memory_bytes for i in intervals] == [10 << 30] * 5 + [0]
    assert await queries.live_engines(db_pool) == ()


async def test_an_engine_asleep_reserves_nothing_in_its_interval(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    for at, state in ((1001.0, S.STARTING), (1002.0, S.READY), (1003.0, S.ASLEEP), (1004.0, S.WAKING)):
        engine = await change(db_pool, engine, state, at)
    assert [i.memory_bytes for i in await queries.engine_intervals(db_pool, engine.id)][-2:] == [0, 10 << 30]


async def test_an_older_epoch_can_neither_place_nor_change(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    assert await queries.raise_epoch(db_pool) == 2
    with pytest.raises(LeadershipLost):
        await queries.place_engine(db_pool, placed(2))
    with pytest.raises(LeadershipLost):
        await change(db_pool, engine, S.STARTING, 1001.0)
    assert await queries.live_engines(db_pool) == (engine,)
    await change(db_pool, engine, S.STOPPED, 1002.0, epoch=2)


async def test_a_change_from_a_state_that_the_engine_is_not_in_is_refused(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    await change(db_pool, engine, S.STARTING, 1001.0)
    with pytest.raises(LeadershipLost):
        await change(db_pool, engine, S.STOPPED, 1002.0)
    assert len(await queries.engine_intervals(db_pool, engine.id)) == 2


async def test_a_new_epoch_waits_for_a_write_under_the_old_one(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    async with db_pool.acquire() as old, old.transaction():
        await queries.place_engine(old, placed())
        async with db_pool.acquire() as new:
            await new.execute("SET lock_timeout = '50ms'")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await queries.raise_epoch(new)


async def test_last_lines_stay_with_the_engine_that_failed(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engine = placed()
    await queries.place_engine(db_pool, engine)
    engine = await change(db_pool, engine, S.STARTING, 1001.0)
    failed = msgspec.structs.replace(transition(engine, S.FAILED, 1002.0), failure="exit status 1")
    await queries.change_engine(db_pool, engine.state, failed, epoch=1, last_lines=("one", "two"))
    await change(db_pool, failed, S.STOPPED, 1003.0)
    record = await queries.engine_record(db_pool, engine.id)
    assert record is not None
    assert (record.engine.failure, record.last_lines) == ("exit status 1", ("one", "two"))


async def test_records_come_newest_first_in_pages(db_pool: Pool) -> None:
    await queries.raise_epoch(db_pool)
    engines = [placed(n) for n in range(1, 5)]
    for engine in engines:
        await queries.place_engine(db_pool, engine)
    await change(db_pool, engines[3], S.STOPPED, 1001.0)

    async def ids(**arguments: Any) -> list[EngineId]:
        return [record.engine.id for record in await queries.engine_records(db_pool, **arguments)]

    assert await ids() == [e.id for e in (engines[2], engines[1], engines[0])]
    assert await ids(stopped=True, limit=2) == [engines[3].id, engines[2].id]
    assert await ids(stopped=True, before=engines[2].id) == [engines[1].id, engines[0].id]
    assert await queries.engine_record(db_pool, EngineId("nonsense")) is None


async def test_only_one_session_leads_at_a_time(db_pool: Pool) -> None:
    async with db_pool.acquire() as first, db_pool.acquire() as second:
        assert await queries.try_leadership(first)
        assert not await queries.try_leadership(second)
    async with db_pool.acquire() as connection:
        await connection.execute("SELECT pg_advisory_unlock_all()")


async def test_a_fleet_is_replaced_only_by_a_newer_one(db_pool: Pool) -> None:
    assert await queries.fleet(db_pool) is None
    newer = Fleet(epoch=2, version=5, at=1.0, engines=(placed(),))
    assert await queries.put_fleet(db_pool, newer)
    assert not await queries.put_fleet(db_pool, newer)
    assert not await queries.put_fleet(db_pool, Fleet(epoch=1, version=9, at=2.0))
    assert await queries.fleet(db_pool) == newer
    assert await queries.put_fleet(db_pool, Fleet(epoch=3, version=1, at=3.0))


async def test_demand_reports_are_the_last_of_each_gateway(db_pool: Pool) -> None:
    gateway = GatewayId(str(uuid.UUID(int=77)))
    later = Demand(gateway=gateway, at=20.0, fleet_epoch=1, fleet_version=1, pools={PoolId("p"): PoolDemand(waiting=1)})
    await queries.put_demand(db_pool, later)
    await queries.put_demand(db_pool, Demand(gateway=gateway, at=10.0, fleet_epoch=1, fleet_version=1))
    assert await queries.demand(db_pool, gateway) == later
    assert await queries.demands_since(db_pool, 20.0) == (later,)
    assert await queries.demands_since(db_pool, 20.5) == ()
    assert await queries.remove_demands_before(db_pool, 21.0) == 1
    assert await queries.demand(db_pool, gateway) is None
