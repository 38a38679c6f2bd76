"""Starts, watches and stops engines on this machine, through its engine host.

The host only forks; everything else happens here, from outside, so that a dead host harms nothing but new starts. An
order to start that may have reached a dying host is never forgotten: its process is found by its log and taken over or,
once the start has been given up, ended. So no engine runs that nobody owns.

    local_host      asks the engine host
    local_watch     sees an engine get ready and end
    local_end       ends one and what it leaves
    local_remains   which processes, sockets and shared memory are an engine's
    local_log       its log
    local_devices   what engines can be placed on
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from engines.arguments import engine_env, served_name, vllm_argv
from engines.errors import LaunchFailed, LaunchRefused
from engines.host import group
from engines.host.layout import Layout
from engines.host.protocol import StartOrder, start_request
from engines.launchers import local_devices, local_end, local_log, local_remains
from engines.launchers.launcher import LaunchEvent, Started
from engines.launchers.local_host import EngineHost, HostAway
from engines.launchers.local_remains import Leader
from engines.launchers.local_watch import Watch
from engines.lifecycle import PENDING
from engines.model import Device, Engine, EngineId, Model, NodeId

HOST_WAIT_S: Final = 60.0
"""How long a start waits for a host that is away."""
ANSWER_S: Final = 10.0
"""How long a host that is there may take for one answer."""
RETRY_S: Final = 0.1
ROTATE_S: Final = 5.0
"""Between looks at the lengths of logs."""
STRAY_GRACE_S: Final = 3.0
EXIT_STATUS_TRIES: Final = 2

log = structlog.get_logger()


class LocalLauncher:
    """The `Launcher` of one machine; owns its watches, never the processes, which outlive it.

    `epoch` is of the controller that it works for: the host is told of it before strays are looked for. `memory_bytes`
    of 0 means a share of the machine's memory. The object must be made and used on one event loop.
    """

    def __init__(
        self,
        *,
        host_socket: Path,
        engines_path: Path,
        run_path: Path,
        models_path: Path,
        installation: str,
        node: NodeId,
        memory_bytes: int = 0,
        epoch: int = 0,
        gpus: bool = True,
        start_silence_s: float = 300.0,
        log_bytes: int = 10 << 20,
        rotate_s: float = ROTATE_S,
        host_wait_s: float = HOST_WAIT_S,
    ) -> None:
        self._host = EngineHost(host_socket)
        self._engines_path = engines_path
        self._run_path = run_path
        self._models_path = models_path
        self._installation = installation
        self._node = node
        self._memory_bytes = memory_bytes
        self._epoch = epoch
        self._gpus = gpus
        self._silence_s = start_silence_s
        self._log_bytes = log_bytes
        self._rotate_s = rotate_s
        self._host_wait_s = host_wait_s
        self._starting: set[EngineId] = set()
        self._watches: dict[EngineId, Watch] = {}
        self._events: asyncio.Queue[LaunchEvent | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rotation: asyncio.Task[None] | None = None

    async def devices(self) -> tuple[Device, ...]:
        """What engines can be placed on: GPUs, or the host's memory where there are none."""
        return await local_devices.devices(self._node, self._memory_bytes, gpus=self._gpus)

    async def start(self, engine: Engine, model: Model) -> Started:
        """Have the host start a placed engine, waiting for the host if it is away; see `Launcher.start`."""
        layout = self._layout(engine.id)
        path = self._models_path / model.digest
        if not path.is_dir():
            raise LaunchFailed(f"the files of model {model.name} are not in the model store: {path} is no folder")
        self._starting.add(engine.id)
        try:
            await asyncio.to_thread(_make_directories, layout)
            leader = await self._order(_start_order(engine, model, layout, path), layout)
        finally:
            self._starting.discard(engine.id)
        # No await from here on: who started an engine knows of it before any event of it comes.
        try:
            local_remains.write_leader(layout, leader)
        except OSError as error:
            log.warning("leader_not_noted", engine=engine.id, error=str(error))  # it is found by its log then
        self._watch(leader, layout, ready=False)
        return Started(address=str(layout.socket), pid=leader.pid, pid_start=leader.pid_start)

    async def adopt(self, engines: Sequence[Engine]) -> tuple[EngineId, ...]:
        """Watch the living among these engines; end everything else of this installation. See `Launcher.adopt`."""
        if self._epoch:
            with contextlib.suppress(HostAway):
                await self._host.hello(self._epoch, within_s=1.0)
        alive = []
        for engine in engines:
            leader = _leader(engine)
            if leader is not None and group.alive(leader.pid, leader.pid_start):
                layout = self._layout(engine.id)
                noted = await asyncio.to_thread(local_remains.read_leader, layout.run)
                leader = noted if noted is not None and noted.pid == leader.pid else leader
                self._watch(leader, layout, ready=engine.state not in PENDING)
                alive.append(engine.id)
        await self._end_strays()
        return tuple(alive)

    async def stop(self, engine: Engine, *, grace_s: float) -> None:
        """End the engine's processes and remove what they leave; see `Launcher.stop` and `local_end`."""
        watch = self._watches.pop(engine.id, None)
        if watch is not None:
            await watch.close()
        await self._end(engine.id, watch.leader if watch else _leader(engine), grace_s)

    async def events(self) -> AsyncIterator[LaunchEvent]:
        """What happens to engines; for one consumer. Ends when the launcher is closed."""
        while (event := await self._events.get()) is not None:
            yield event

    def log_tail(self, engine: EngineId, lines: int) -> tuple[str, ...]:
        """The last lines of an engine's log, oldest first; empty if there is none."""
        return local_log.tail(self._layout(engine).log, lines)

    async def close(self) -> None:
        """Stop watching; engines live on."""
        tasks = {task for task in (*self._tasks, self._rotation) if task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))
        self._watches.clear()
        self._events.put_nowait(None)

    def _layout(self, engine: EngineId) -> Layout:
        run = local_remains.run_directory(self._run_path, self._installation, engine)
        return Layout(directory=self._engines_path / engine, run=run)

    async def _order(self, order: StartOrder, layout: Layout) -> Leader:
        """Give the host an order until it is carried out or refused.

        Giving it twice is safe: a host answers a repeated order with the process that it has, and for a host that died
        over it the process is looked for before another one gets the order.
        """
        engine = EngineId(order.engine)
        asked_us = time.monotonic_ns() // 1000
        deadline = time.monotonic() + self._host_wait_s
        heard = False
        try:
            while True:
                before, heard = heard, True
                try:
                    within_s = max(RETRY_S, min(ANSWER_S, deadline - time.monotonic()))
                    answer = await self._host.ask(start_request(order), within_s=within_s)
                    break
                except HostAway as away:
                    heard = before or away.heard
                    if heard and (found := await self._find(engine)) is not None:
                        return Leader(engine=engine, pid=found.pid, pid_start=found.pid_start, asked_us=asked_us)
                    if time.monotonic() > deadline:
                        raise LaunchFailed(f"{away}; waited {self._host_wait_s:g} s for it") from None
                await asyncio.sleep(RETRY_S)
        except BaseException:
            if heard:
                self._in_background(self._revoke(engine))
            raise
        if not answer.get("ok"):
            await asyncio.to_thread(local_remains.clean, layout.run)
            refusal = LaunchFailed if answer.get("code") == "fork_failed" else LaunchRefused
            raise refusal(f"the engine host did not start engine {engine}: {answer.get('error')}")
        return Leader(engine=engine, pid=answer["pid"], pid_start=answer["pid_start"], asked_us=asked_us)

    async def _find(self, engine: EngineId) -> Leader | None:
        return await asyncio.to_thread(local_remains.find_leader, self._engines_path, engine)

    async def _revoke(self, engine: EngineId) -> None:
        """End what comes of an order that was given up but may still lie in a host's inbox, until that is empty."""
        answered = 0
        while answered < 2:
            leader = None
            with contextlib.suppress(HostAway):
                child = (await self._host.engines()).get(engine)
                leader = Leader(engine=engine, pid=child["pid"], pid_start=child["pid_start"]) if child else None
                answered += 1
            await self._end(engine, leader, 0.0)
            await asyncio.sleep(RETRY_S)

    def _watch(self, leader: Leader, layout: Layout, *, ready: bool) -> None:
        self._watches[leader.engine] = Watch(
            leader,
            layout,
            ready=ready,
            silence_s=self._silence_s,
            exit_status=self._exit_status,
            events=self._events.put_nowait,
        )
        if self._rotation is None:
            self._rotation = asyncio.create_task(self._rotate_logs(), name="rotate logs")

    async def _exit_status(self, engine: EngineId) -> int | None:
        for _ in range(EXIT_STATUS_TRIES):
            status = await self._host.exit_status(engine)
            if status is not None:
                return status
            await asyncio.sleep(RETRY_S)
        return None

    async def _end(self, engine: EngineId, leader: Leader | None, grace_s: float) -> None:
        layout = self._layout(engine)
        if leader is None:
            leader = await asyncio.to_thread(local_remains.read_leader, layout.run) or await self._find(engine)
        await local_end.end(layout, leader, grace_s=grace_s)

    async def _end_strays(self) -> None:
        """End what is of this installation, by the names of runtime directories, and in nobody's list."""
        known = {self._layout(engine).run for engine in (*self._watches, *self._starting)}
        found = await asyncio.to_thread(
            local_remains.installed_engines, self._run_path, self._installation, self._engines_path
        )
        await asyncio.gather(*(self._end_stray(run, engine) for run, engine in found.items() if run not in known))

    async def _end_stray(self, run: Path, engine: EngineId | None) -> None:
        log.warning("stray_ended", directory=run.name, engine=engine)
        if engine is None:
            await asyncio.to_thread(local_remains.clean, run)
        else:
            await self._end(engine, None, STRAY_GRACE_S)

    async def _rotate_logs(self) -> None:
        while True:
            await asyncio.sleep(self._rotate_s)
            for watch in tuple(self._watches.values()):
                try:
                    await asyncio.to_thread(local_log.rotate, watch.layout.log, self._log_bytes)
                except OSError as error:
                    log.warning("log_not_rotated", engine=watch.leader.engine, error=str(error))

    def _in_background(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _start_order(engine: Engine, model: Model, layout: Layout, model_path: Path) -> StartOrder:
    return StartOrder(
        engine=engine.id,
        epoch=engine.epoch,
        model_path=str(model_path),
        served_name=served_name(model.digest),
        engine_dir=str(layout.directory),
        run_dir=str(layout.run),
        argv=vllm_argv(engine.spec, model),
        env=engine_env(engine.spec, local_devices.gpu_index(engine.device)),
        threads=engine.spec.arguments.threads,
    )


def _leader(engine: Engine) -> Leader | None:
    if engine.pid is None or engine.pid_start is None:
        return None
    return Leader(engine=engine.id, pid=engine.pid, pid_start=engine.pid_start)


def _make_directories(layout: Layout) -> None:
    """Make the directories of an engine, and those above, readable by nobody else."""
    above = (layout.directory.parent, layout.run.parent.parent, layout.run.parent)
    for path in (*above, layout.directory, layout.run, layout.temporary):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
