"""The control process' life, in this process: real Postgres and Valkey, scripted engines."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import asyncpg
import pytest
from deciding import GB, device, variant
from redis.asyncio import Redis

from app.control import ControlParts, run_control
from app.notifications import Notifications
from app.settings import ControllerSettings
from engines import commands, queries
from engines.catalog import Catalog
from engines.controller import Controller
from engines.fleet import DemandInbox, FleetPublisher
from engines.launchers.memory import MemoryLauncher, MemoryNode, steady
from engines.model import Engine, EngineState

Pool: TypeAlias = "asyncpg.Pool[Any]"
Process: TypeAlias = "Callable[[], asyncio.Task[int]]"
BOT = variant("a")


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode([device(4 * GB)], behaviour=steady(0.01))


@pytest.fixture
async def redis(valkey: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey) as client:
        yield client


@pytest.fixture
async def control(database: str, db_pool: Pool, redis: Redis, node: MemoryNode) -> Process:
    """Starts a control process, as a task, on a database with one variant."""
    await db_pool.execute("INSERT INTO workspace (name) VALUES ('acme')")
    await queries.create_model(db_pool, BOT.model)
    await queries.create_variant(db_pool, "acme", BOT)
    installation = (await queries.installation(db_pool)).id

    async def in_flight(_: Engine) -> int | None:
        return 0

    async def sweep(_: float) -> int:
        return 0

    def build(epoch: int) -> ControlParts:
        launcher = MemoryLauncher(node)
        controller = Controller(
            database=db_pool,
            launcher=launcher,
            publish=FleetPublisher(db_pool, redis, installation).publish,
            in_flight=in_flight,
            settings=ControllerSettings(tick_s=0.02),
            epoch=epoch,
        )
        return ControlParts(
            controller=controller,
            launcher=launcher,
            catalog=Catalog(db_pool),
            notifications=Notifications(database),
            inbox=DemandInbox(db_pool, redis, installation, controller.demand_received),
            sweep=sweep,
        )

    return lambda: asyncio.create_task(run_control(database, build))


async def until(pool: Pool, found: Callable[[tuple[Engine, ...]], bool], *, epoch: int) -> tuple[Engine, ...]:
    """Wait for a published fleet of this epoch."""
    async with asyncio.timeout(10):
        while True:
            fleet = await queries.fleet(pool)
            if fleet is not None and fleet.epoch == epoch and found(fleet.engines):
                return fleet.engines
            await asyncio.sleep(0.01)


async def notify(pool: Pool, command: commands.Command) -> None:
    await pool.execute("SELECT pg_notify($1, $2)", commands.CHANNEL, commands.encode(command))


def one_ready(engines: tuple[Engine, ...]) -> bool:
    return [engine.state for engine in engines] == [EngineState.READY]


async def listening(pool: Pool) -> None:
    """Wait until the control process hears notifications."""
    async with asyncio.timeout(10):
        while not await pool.fetchval("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%LISTEN%greenroom_command%'"):
            await asyncio.sleep(0.01)


async def prewarmed(pool: Pool, *, epoch: int = 1) -> Engine:
    """An operator's order makes an engine ready."""
    await until(pool, lambda _: True, epoch=epoch)
    await listening(pool)
    await notify(pool, commands.Prewarm("acme", "bot"))
    return (await until(pool, one_ready, epoch=epoch))[0]


async def test_on_sigterm_the_engines_live_on_and_the_next_one_adopts_them(
    control: Process, db_pool: Pool, node: MemoryNode
) -> None:
    first = control()
    engine = await prewarmed(db_pool)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await first == 0
    assert node.running == {engine.id}
    second = control()
    assert [e.id for e in await until(db_pool, one_ready, epoch=2)] == [engine.id]
    os.kill(os.getpid(), signal.SIGTERM)
    assert await second == 0


async def test_on_sigint_no_engine_is_left(control: Process, db_pool: Pool, node: MemoryNode) -> None:
    process = control()
    await prewarmed(db_pool)
    os.kill(os.getpid(), signal.SIGINT)
    assert await process == 0
    assert node.present == frozenset()
    assert await queries.live_engines(db_pool) == ()


async def test_an_operators_order_stops_an_engine(control: Process, db_pool: Pool) -> None:
    process = control()
    engine = await prewarmed(db_pool)
    await notify(db_pool, commands.Prewarm("acme", "nobody"))
    await db_pool.execute("SELECT pg_notify($1, 'nonsense')", commands.CHANNEL)
    await notify(db_pool, commands.Stop(engine.id, force=True))
    await until(db_pool, lambda engines: engines == (), epoch=1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await process == 0


async def test_it_waits_while_another_leads(control: Process, database: str, db_pool: Pool) -> None:
    other = await asyncpg.connect(database)
    assert await queries.try_leadership(other)
    process = control()
    await asyncio.sleep(0.2)
    assert await queries.fleet(db_pool) is None
    await other.close()
    await until(db_pool, lambda _: True, epoch=1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await process == 0


async def test_who_is_told_to_stop_while_waiting_never_leads(control: Process, database: str, db_pool: Pool) -> None:
    other = await asyncpg.connect(database)
    assert await queries.try_leadership(other)
    process = control()
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await process == 0
    await other.close()
    assert (await queries.installation(db_pool)).epoch == 0


async def test_i10_who_loses_the_lock_ends_at_once_and_leaves_the_engines(
    control: Process, db_pool: Pool, node: MemoryNode
) -> None:
    process = control()
    engine = await prewarmed(db_pool)
    await db_pool.fetch(
        """
        SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database ON oid = database
        WHERE locktype = 'advisory' AND datname = current_database()
        """
    )
    async with asyncio.timeout(5):
        assert await process == 1
    assert node.running == {engine.id}
