"""The launcher without processes."""

from __future__ import annotations

import asyncio

import pytest
from deciding import device, engine, engine_id, model, variant

from engines.errors import LaunchFailed
from engines.launchers.launcher import Exited, LaunchEvent, Ready, Started
from engines.launchers.memory import Behaviour, ManualTime, MemoryLauncher, MemoryNode, seeded, steady
from engines.model import EngineState

A = variant("a")
FIRST, SECOND = engine(1, A, EngineState.PLACED), engine(2, A, EngineState.PLACED)


def node(*behaviours: Behaviour) -> MemoryNode:
    script = iter(behaviours)
    return MemoryNode([device()], behaviour=lambda _: next(script))


def test_an_engine_becomes_ready_after_its_start_time() -> None:
    stage = node(Behaviour(start_s=2.0))
    assert stage.start(FIRST, 10.0) == Started(address=f"/memory/{FIRST.id}/s", pid=1, pid_start=1)
    assert stage.next_at() == 12.0
    assert stage.due(11.9) == ()
    assert stage.due(12.0) == (Ready(engine=FIRST.id, phases_us={"listening": 2_000_000}),)
    assert stage.next_at() is None


def test_engines_fail_and_die_as_scripted() -> None:
    stage = node(Behaviour(start_s=1.0, fails="exit status 1", last_lines=("a", "b")), Behaviour(lives_s=5.0))
    stage.start(FIRST, 0.0)
    stage.start(SECOND, 0.0)
    assert stage.due(10.0) == (
        Exited(engine=FIRST.id, reason="exit status 1", last_lines=("a", "b")),
        Ready(engine=SECOND.id, phases_us={"listening": 1_000_000}),
        Exited(engine=SECOND.id, reason="killed by SIGSEGV"),
    )
    assert stage.running == frozenset()
    assert stage.present == {FIRST.id, SECOND.id}
    assert stage.log_tail(FIRST.id, 1) == ("b",)
    assert stage.log_tail(FIRST.id, 0) == ()


def test_a_refused_start_leaves_nothing() -> None:
    stage = node(Behaviour(refused="no"))
    with pytest.raises(LaunchFailed, match="no"):
        stage.start(FIRST, 0.0)
    assert stage.present == frozenset()


def test_a_stopped_engine_says_nothing_more() -> None:
    stage = node(Behaviour(start_s=1.0), Behaviour(start_s=1.0))
    stage.start(FIRST, 0.0)
    stage.start(SECOND, 0.0)
    stage.end(FIRST.id)
    assert [event.engine for event in stage.due(9.0)] == [SECOND.id]


def test_a_killed_engine_exits_at_once() -> None:
    stage = node(Behaviour(start_s=1.0))
    stage.start(FIRST, 0.0)
    stage.kill(FIRST.id, 0.5)
    stage.kill(engine_id(99), 0.5)
    assert stage.due(9.0) == (Exited(engine=FIRST.id, reason="killed by SIGKILL"),)


def test_a_seed_is_one_script() -> None:
    def drawn(seed: int) -> list[Behaviour]:
        script = seeded(seed)
        return [script(FIRST) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_test_may_say_where_an_engine_is_reached() -> None:
    stage = MemoryNode([device()], address_for=lambda _: "/elsewhere/s")
    assert stage.start(FIRST, 0.0).address == "/elsewhere/s"


async def test_the_launcher_tells_events_as_manual_time_passes() -> None:
    time = ManualTime(0.0)
    launcher = MemoryLauncher(MemoryNode([device()], behaviour=steady(2.0, stop_s=3.0)), time=time)
    told: asyncio.Queue[LaunchEvent] = asyncio.Queue()

    async def watch() -> None:
        async for event in launcher.events():
            told.put_nowait(event)

    watching = asyncio.create_task(watch())
    await launcher.start(FIRST, model())
    for _ in range(5):
        await asyncio.sleep(0)
    assert told.empty()
    time.advance(2.0)
    assert await told.get() == Ready(engine=FIRST.id, phases_us={"listening": 2_000_000})

    stopping = asyncio.create_task(launcher.stop(FIRST, grace_s=10.0))
    await asyncio.sleep(0)
    assert launcher.node.running == {FIRST.id}
    time.advance(3.0)
    await stopping
    assert launcher.node.present == frozenset()
    await launcher.close()
    await watching


async def test_a_second_launcher_adopts_what_lives_and_ends_what_nobody_knows() -> None:
    stage = MemoryNode([device()])
    first = MemoryLauncher(stage)
    await first.start(FIRST, model())
    await first.start(SECOND, model())
    second = MemoryLauncher(stage)
    assert await second.adopt([FIRST, engine(3, A)]) == (FIRST.id,)
    assert stage.present == {FIRST.id}
