"""The local launcher with real processes: a stand-in host that forks scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uuid_utils

from engines.errors import LaunchFailed, LaunchRefused
from engines.host import group
from engines.host.protocol import encode
from engines.launchers import local_remains
from engines.launchers.launcher import Exited, LaunchEvent, Ready, Started
from engines.launchers.local import LocalLauncher
from engines.launchers.local_host import EngineHost
from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    Model,
    ModelDigest,
    NodeId,
    RuntimeArguments,
)

NODE = NodeId("here")
DIGEST = ModelDigest("ab" * 32)
MODEL = Model(
    name="fake",
    digest=DIGEST,
    architecture="LlamaForCausalLM",
    weights_bytes=1,
    parameters=1,
    max_model_len=2048,
    kv_bytes_per_token=1,
    dtype="bfloat16",
    source="test",
)
FAKE_HOST = Path(__file__).parents[2] / "fake_host.py"


class Place:
    """A machine for engines: directories, a model whose behaviour a test sets, and a host that it starts and kills."""

    def __init__(self, directory: Path) -> None:
        self.run, self.engines, self.models = directory / "r", directory / "engines", directory / "models"
        self.socket = self.run / "host.sock"
        self.model = self.models / DIGEST
        for path in (self.run, self.engines, self.model):
            path.mkdir(parents=True)
        self.host: subprocess.Popen[bytes] | None = None
        self.behave()

    def behave(self, **how: Any) -> None:
        (self.model / "behave.json").write_text(json.dumps(how))

    def host_once(self, trick: str) -> None:
        (self.model / "host_once").write_text(trick)

    def start_host(self) -> None:
        self.host = subprocess.Popen([sys.executable, FAKE_HOST, self.socket])

    def kill_host(self) -> None:
        assert self.host is not None
        self.host.kill()
        self.host.wait()

    def launcher(self, installation: str = "0123abcd", **options: Any) -> LocalLauncher:
        return LocalLauncher(
            host_socket=self.socket,
            engines_path=self.engines,
            run_path=self.run,
            models_path=self.models,
            installation=installation,
            node=NODE,
            memory_bytes=1 << 30,
            gpus=False,
            **{"host_wait_s": 20.0, **options},
        )

    def processes(self, engine: Engine) -> set[int]:
        return local_remains.processes_by_log(self.engines).get(engine.id, set())

    def run_dirs(self) -> list[str]:
        return sorted(path.name for path in (self.run / "e").glob("*"))


class Watching:
    """A launcher with its events in a list."""

    def __init__(self, launcher: LocalLauncher) -> None:
        self.launcher = launcher
        self.seen: list[LaunchEvent] = []
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self.launcher.events():
            self.seen.append(event)

    async def start(self, engine: Engine) -> Engine:
        return started(engine, await self.launcher.start(engine, MODEL))

    async def ready(self, engine: Engine) -> Ready:
        return await self._event(engine, Ready)

    async def exited(self, engine: Engine) -> Exited:
        return await self._event(engine, Exited)

    async def _event(self, engine: Engine, kind: type[Any]) -> Any:
        def those() -> list[LaunchEvent]:
            return [event for event in self.seen if event.engine == engine.id and isinstance(event, kind)]

        await eventually(lambda: bool(those()))
        return those()[0]

    async def close(self) -> None:
        await self.launcher.close()
        await asyncio.wait_for(self._task, 5)


@pytest.fixture
def place(short_dir: Path) -> Iterator[Place]:
    made = Place(short_dir)
    made.start_host()
    yield made
    if made.host is not None:
        made.host.send_signal(signal.SIGCONT)
        made.kill_host()
    for engine in local_remains.processes_by_log(made.engines):
        while local_remains.kill_by_log(made.engines, engine):
            pass


@pytest.fixture
async def watching(place: Place) -> AsyncIterator[Watching]:
    made = Watching(place.launcher())
    yield made
    await made.close()


def engine(**changes: Any) -> Engine:
    spec = EngineSpec(model_digest=DIGEST, arguments=RuntimeArguments(threads=2))
    made = Engine(
        id=EngineId(str(uuid_utils.uuid7())),
        pool=spec.pool,
        spec=spec,
        state=EngineState.PLACED,
        since=0.0,
        node=NODE,
        device=DeviceId("here/mem"),
        memory_bytes=1,
        epoch=1,
        created_at=0.0,
    )
    return msgspec.structs.replace(made, **changes)


def started(engine: Engine, what: Started, state: EngineState = EngineState.STARTING) -> Engine:
    return msgspec.structs.replace(engine, state=state, address=what.address, pid=what.pid, pid_start=what.pid_start)


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_start_makes_an_engine_that_gets_ready_and_says_how_long_each_phase_took(
    place: Place, watching: Watching
) -> None:
    place.behave(phase_s=0.03)
    made = await watching.start(engine())
    ready = await watching.ready(made)
    assert list(ready.phases_us) == ["fork", "config", "weights", "init", "listening"]
    assert all(ready.phases_us[phase] >= 30_000 for phase in ("config", "weights", "init"))
    assert made.address is not None
    _, writer = await asyncio.open_unix_connection(made.address)
    writer.close()
    assert watching.seen == [ready]


async def test_an_engine_is_told_its_model_arguments_and_threads_and_only_we_can_enter_its_directories(
    place: Place, watching: Watching
) -> None:
    made = await watching.start(engine())
    await watching.ready(made)
    first = watching.launcher.log_tail(made.id, 100)[0]
    assert "--max-model-len 2048" in first and "'OMP_NUM_THREADS': '2'" in first
    run = place.run / "e" / f"0123abcd-{made.id[-12:]}"
    for path in (place.run, place.run / "e", run, run / "t", place.engines, place.engines / made.id):
        assert path.stat().st_mode & 0o777 == 0o700, path
    leader = local_remains.read_leader(run)
    assert leader is not None and (leader.engine, leader.pid, leader.pid_start) == (made.id, made.pid, made.pid_start)


async def test_a_stopped_engine_leaves_nothing_and_tells_nothing(place: Place, watching: Watching) -> None:
    made = await watching.start(engine())
    ready = await watching.ready(made)
    await watching.launcher.stop(made, grace_s=5.0)
    assert (place.processes(made), place.run_dirs(), watching.seen) == (set(), [], [ready])
    await watching.launcher.stop(made, grace_s=5.0)


async def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(place: Place, watching: Watching) -> None:
    place.behave(ignore_term=True, children=2)
    made = await watching.start(engine())
    await watching.ready(made)
    began = time.monotonic()
    await watching.launcher.stop(made, grace_s=0.2)
    assert 0.2 <= time.monotonic() - began < 2.0
    assert (place.processes(made), place.run_dirs()) == (set(), [])


async def test_a_killed_leader_is_reported_and_stop_ends_the_children_that_outlived_it(
    place: Place, watching: Watching
) -> None:
    place.behave(children=2)
    made = await watching.start(engine())
    await watching.ready(made)
    assert made.pid is not None
    os.kill(made.pid, signal.SIGKILL)
    exited = await watching.exited(made)
    assert exited.reason == "killed by SIGKILL"
    assert exited.last_lines[-1] == "phase init"
    assert len(place.processes(made)) == 2
    await watching.launcher.stop(made, grace_s=5.0)
    assert (place.processes(made), place.run_dirs()) == (set(), [])


async def test_a_child_that_left_the_session_is_ended_too(place: Place, watching: Watching) -> None:
    place.behave(runaway=True)
    made = await watching.start(engine())
    await watching.ready(made)
    assert made.pid is not None and len(group.members(made.pid)) == 1
    assert len(place.processes(made)) == 2
    await watching.launcher.stop(made, grace_s=5.0)
    assert place.processes(made) == set()


async def test_an_engine_that_ends_while_starting_is_reported_with_its_exit_code_and_last_lines(
    place: Place, watching: Watching
) -> None:
    place.behave(exit_at="weights", status=3)
    made = await watching.start(engine())
    exited = await watching.exited(made)
    assert exited.reason == "ended with exit code 3"
    assert exited.last_lines[-2:] == ("phase config", "phase weights")
    assert watching.seen == [exited]


async def test_no_event_of_an_engine_comes_before_its_start_has_returned(place: Place, watching: Watching) -> None:
    place.behave(exit_at="config", phase_s=0)
    for _ in range(10):
        before = len(watching.seen)
        made = await watching.start(engine())
        assert len(watching.seen) == before
        await watching.exited(made)


async def test_a_start_without_progress_is_ended_and_says_how_far_it_got(place: Place) -> None:
    watching = Watching(place.launcher(start_silence_s=0.3))
    place.behave(stuck_at="weights", children=1, ignore_term=True)
    made = await watching.start(engine())
    exited = await watching.exited(made)
    assert exited.reason.startswith("no progress for 0.3 s") and exited.reason.endswith("weights")
    assert place.processes(made) == set()
    await watching.close()


async def test_a_log_that_grows_is_progress(place: Place) -> None:
    watching = Watching(place.launcher(start_silence_s=0.3))
    place.behave(chatter_s=0.8)
    await watching.ready(await watching.start(engine()))
    await watching.close()


async def test_a_log_that_grows_in_circles_is_no_progress_for_ever(place: Place) -> None:
    watching = Watching(place.launcher(start_silence_s=0.1))
    place.behave(chatter_s=60)
    assert "no progress" in (await watching.exited(await watching.start(engine()))).reason
    await watching.close()


async def test_an_engine_that_listens_but_is_not_healthy_is_not_ready(place: Place) -> None:
    watching = Watching(place.launcher(start_silence_s=0.3))
    place.behave(health=503)
    made = await watching.start(engine())
    assert (await watching.exited(made)).reason.endswith("listening")
    assert len(watching.seen) == 1
    await watching.close()


async def test_a_start_waits_for_a_host_that_is_away(place: Place, watching: Watching) -> None:
    place.kill_host()
    start = asyncio.create_task(watching.start(engine()))
    assert (await asyncio.wait({start}, timeout=0.3))[0] == set()
    place.start_host()
    await watching.ready(await start)


async def test_a_start_fails_if_the_host_stays_away(place: Place) -> None:
    place.kill_host()
    watching = Watching(place.launcher(host_wait_s=0.3))
    with pytest.raises(LaunchFailed, match="is away"):
        await watching.start(engine())
    await watching.close()


async def test_an_order_of_an_old_controller_is_refused(place: Place, watching: Watching) -> None:
    await watching.ready(await watching.start(engine(epoch=5)))
    with pytest.raises(LaunchRefused, match="epoch 4 is over"):
        await watching.start(engine(epoch=4))


async def test_a_new_controller_tells_the_host_before_it_adopts(place: Place, watching: Watching) -> None:
    await watching.ready(await watching.start(engine(epoch=1)))
    successor = place.launcher(epoch=2)
    await successor.adopt([])
    with pytest.raises(LaunchRefused, match="epoch 1 is over"):
        await watching.start(engine(epoch=1))
    await successor.close()


async def test_a_fork_that_fails_is_a_failed_launch(place: Place, watching: Watching) -> None:
    place.host_once("fail")
    with pytest.raises(LaunchFailed, match="out of processes") as failure:
        await watching.start(engine())
    assert not isinstance(failure.value, LaunchRefused)
    assert place.run_dirs() == []


async def test_a_model_that_is_not_in_the_store_is_a_failed_launch(place: Place, watching: Watching) -> None:
    shutil.rmtree(place.model)
    with pytest.raises(LaunchFailed, match="not in the model store"):
        await watching.start(engine())


async def test_i10_a_host_that_dies_before_it_forks_is_asked_again_when_it_is_back(
    place: Place, watching: Watching
) -> None:
    place.host_once("die_before_fork")
    start = asyncio.create_task(watching.start(engine()))
    assert place.host is not None
    await asyncio.to_thread(place.host.wait)
    place.start_host()
    made = await start
    await watching.ready(made)
    assert len(place.processes(made)) == 1


async def test_i10_an_engine_whose_host_died_after_forking_it_is_taken_over(place: Place, watching: Watching) -> None:
    place.host_once("die_after_fork")
    made = await watching.start(engine())
    await watching.ready(made)
    assert place.processes(made) == {made.pid}
    assert made.pid is not None
    os.kill(made.pid, signal.SIGKILL)
    assert (await watching.exited(made)).reason == "ended; the engine host can't say how"


async def test_i10_an_order_given_up_over_a_frozen_host_comes_to_nothing(place: Place) -> None:
    watching = Watching(place.launcher(host_wait_s=0.3))
    host = EngineHost(place.socket)
    await eventually(place.socket.exists)
    assert place.host is not None
    os.kill(place.host.pid, signal.SIGSTOP)
    made = engine()
    with pytest.raises(LaunchFailed):
        await watching.start(made)
    os.kill(place.host.pid, signal.SIGCONT)
    await eventually(lambda: not watching.launcher._tasks)
    assert (await host.ask(encode({"op": "exit_status", "engine": made.id})))["status"] < 0
    assert (place.processes(made), place.run_dirs()) == (set(), [])
    await watching.close()


async def test_i10_a_start_that_is_cancelled_leaves_no_engine(place: Place, watching: Watching) -> None:
    await eventually(place.socket.exists)
    assert place.host is not None
    os.kill(place.host.pid, signal.SIGSTOP)
    made = engine()
    start = asyncio.create_task(watching.start(made))
    assert (await asyncio.wait({start}, timeout=0.3))[0] == set()
    start.cancel()
    await asyncio.wait({start})
    os.kill(place.host.pid, signal.SIGCONT)
    await eventually(lambda: not watching.launcher._tasks)
    assert (place.processes(made), place.run_dirs()) == (set(), [])


async def test_engines_outlive_a_controller_and_the_next_one_adopts_them(place: Place) -> None:
    first = Watching(place.launcher())
    one, two = await first.start(engine()), await first.start(engine())
    await first.ready(one), await first.ready(two)
    await first.close()
    second = Watching(place.launcher())
    one = msgspec.structs.replace(one, state=EngineState.READY)
    assert await second.launcher.adopt([one, two]) == (one.id, two.id)
    ready = await second.ready(two)
    assert set(ready.phases_us) == {"fork", "config", "weights", "init", "listening"}
    assert one.pid is not None
    os.kill(one.pid, signal.SIGKILL)
    exited = await second.exited(one)
    assert second.seen == [ready, exited]
    await second.launcher.stop(two, grace_s=5.0)
    await second.close()


async def test_an_engine_that_died_without_a_controller_is_not_adopted_and_its_remains_are_removed(
    place: Place,
) -> None:
    first = Watching(place.launcher())
    place.behave(children=1)
    made = await first.start(engine())
    await first.ready(made)
    await first.close()
    assert made.pid is not None
    leader = made.pid
    os.kill(leader, signal.SIGKILL)
    await eventually(lambda: leader not in group.members(leader))
    second = Watching(place.launcher())
    assert await second.launcher.adopt([made]) == ()
    assert (place.processes(made), place.run_dirs()) == (set(), [])
    await second.close()


async def test_processes_of_this_installation_that_nobody_lists_are_ended_and_others_are_left_alone(
    place: Place,
) -> None:
    first, foreign = Watching(place.launcher()), Watching(place.launcher("fedc0000"))
    noted, unnoted, theirs = engine(), engine(), engine()
    noted, unnoted, theirs = await first.start(noted), await first.start(unnoted), await foreign.start(theirs)
    for made, owner in ((noted, first), (unnoted, first), (theirs, foreign)):
        await owner.ready(made)
    await first.close()
    (place.run / "e" / f"0123abcd-{unnoted.id[-12:]}" / "pid").unlink()
    (place.run / "e" / "0123abcd-000000000000").mkdir()
    second = place.launcher()
    assert await second.adopt([]) == ()
    assert (place.processes(noted), place.processes(unnoted)) == (set(), set())
    assert place.processes(theirs) == {theirs.pid}
    assert place.run_dirs() == [f"fedc0000-{theirs.id[-12:]}"]
    await second.close()
    await foreign.close()


async def test_a_pid_that_is_another_process_by_now_is_neither_adopted_nor_touched(place: Place) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        start = group.start_time(bystander.pid)
        assert start is not None
        reused = engine(state=EngineState.READY, pid=bystander.pid, pid_start=start - 1)
        launcher = place.launcher()
        assert await launcher.adopt([reused]) == ()
        await launcher.stop(reused, grace_s=0.0)
        assert bystander.poll() is None
        await launcher.close()
    finally:
        bystander.kill()
        bystander.wait()


async def test_shared_memory_of_an_engine_is_removed_with_it_and_no_other(place: Place, watching: Watching) -> None:
    unique = f"{os.getpid()}_{time.monotonic_ns()}"
    litter, sem, foreign, held = f"psm_{unique}", f"sem.mp-{unique}", f"notes_{unique}", f"psm_held_{unique}"
    files = {name: Path("/dev/shm") / name for name in (litter, sem, foreign, held)}
    place.behave(shared_memory=[*files], ignore_term=True)
    try:
        made = await watching.start(engine())
        await watching.ready(made)
        assert all(path.exists() for path in files.values())
        with files[held].open():
            await watching.launcher.stop(made, grace_s=0.0)
        assert {name for name, path in files.items() if path.exists()} == {foreign, held}
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)


async def test_shared_memory_of_an_engine_that_was_killed_is_removed_too(place: Place, watching: Watching) -> None:
    litter = Path("/dev/shm") / f"psm_{os.getpid()}_{time.monotonic_ns()}"
    place.behave(shared_memory=[litter.name])
    try:
        made = await watching.start(engine())
        await watching.ready(made)
        run = place.run / "e" / f"0123abcd-{made.id[-12:]}"
        await eventually((run / "shm").exists)
        assert made.pid is not None
        os.kill(made.pid, signal.SIGKILL)
        await watching.exited(made)
        assert litter.exists()
        await watching.launcher.stop(made, grace_s=0.0)
        assert not litter.exists()
    finally:
        litter.unlink(missing_ok=True)


async def test_a_log_that_grows_beyond_its_bound_is_rotated_and_its_end_still_shown(place: Place) -> None:
    watching = Watching(place.launcher(log_bytes=500, rotate_s=0.05))
    place.behave(chatter_s=20.0)
    made = await watching.start(engine())
    older = place.engines / made.id / "log.1"
    await eventually(older.exists)
    assert older.stat().st_size == 500
    await eventually(lambda: watching.launcher.log_tail(made.id, 20) == ("still at it",) * 20)
    assert (place.engines / made.id / "log").stat().st_size < 1500
    await watching.close()


async def test_events_end_when_the_launcher_is_closed(place: Place) -> None:
    watching = Watching(place.launcher())
    made = await watching.start(engine())
    await watching.ready(made)
    await watching.close()
    assert made.pid is not None and made.pid_start is not None and group.alive(made.pid, made.pid_start)


async def test_the_device_is_the_memory_that_engines_may_have(place: Place, watching: Watching) -> None:
    (device,) = await watching.launcher.devices()
    assert (device.id, device.node, device.memory_bytes) == ("here/mem", NODE, 1 << 30)


async def test_many_engines_start_and_stop_at_once(place: Place, watching: Watching) -> None:
    made = await asyncio.gather(*(watching.start(engine()) for _ in range(10)))
    for each in made:
        await watching.ready(each)
    await asyncio.gather(*(watching.launcher.stop(each, grace_s=5.0) for each in made))
    assert place.run_dirs() == []
    with contextlib.suppress(FileNotFoundError):
        assert not local_remains.processes_by_log(place.engines)
