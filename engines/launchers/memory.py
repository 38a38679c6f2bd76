"""A launcher without processes: engines that start, fail and exit by a script, for tests and simulation.

`MemoryNode` is the script's stage: plain calls with `now` as an argument, so that a simulator can drive it without an
event loop. `MemoryLauncher` is the `Launcher` over it, for a real controller; its time is the machine's or a
`ManualTime`'s.

    node = MemoryNode(devices, behaviour=seeded(7))
    launcher = MemoryLauncher(node, time=ManualTime())
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from time import time as wall_clock
from typing import Any, Protocol

from msgspec import Struct

from engines.errors import LaunchFailed
from engines.launchers.launcher import Exited, LaunchEvent, Ready, Started
from engines.model import Device, Engine, EngineId, Model


class Behaviour(Struct, frozen=True, kw_only=True):
    """What one engine will do."""

    start_s: float = 1.0
    """From its start until it is ready, or until it fails."""
    refused: str | None = None
    """No process comes into being, for this reason."""
    fails: str | None = None
    """It exits instead of becoming ready, for this reason."""
    lives_s: float | None = None
    """It exits so long after it was ready."""
    stop_s: float = 0.0
    """From the order to stop until nothing is left."""
    last_lines: tuple[str, ...] = ()
    """The end of its log."""


def steady(start_s: float = 1.0, *, stop_s: float = 0.0) -> Callable[[Engine], Behaviour]:
    """Every engine starts in `start_s` and lives until it is stopped."""
    behaviour = Behaviour(start_s=start_s, stop_s=stop_s)
    return lambda _: behaviour


def seeded(
    seed: int,
    *,
    start_s: tuple[float, float] = (0.5, 5.0),
    refuse: float = 0.0,
    fail: float = 0.1,
    die: float = 0.1,
    lives_s: tuple[float, float] = (1.0, 300.0),
    stop_s: tuple[float, float] = (0.0, 3.0),
) -> Callable[[Engine], Behaviour]:
    """Behaviours drawn from a seed: ranges in seconds, and shares of engines that are refused, fail or die."""
    draw = random.Random(seed)  # noqa: S311 (a script, no secret)

    def behaviour(_: Engine) -> Behaviour:
        return Behaviour(
            start_s=draw.uniform(*start_s),
            refused="the script refuses it" if draw.random() < refuse else None,
            fails="exit status 1" if draw.random() < fail else None,
            lives_s=draw.uniform(*lives_s) if draw.random() < die else None,
            stop_s=draw.uniform(*stop_s),
            last_lines=("the script ends here",),
        )

    return behaviour


class MemoryNode:
    """Devices and the engines that pretend to run on them; outlives controllers as a real machine does.

    `address_for` says where an engine is reached: a test can point it at a fake engine's Unix socket.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        *,
        behaviour: Callable[[Engine], Behaviour] | None = None,
        address_for: Callable[[Engine], str] | None = None,
    ) -> None:
        self.devices = tuple(devices)
        self._behaviour = behaviour or steady()
        self._address_for = address_for or (lambda engine: f"/memory/{engine.id}/s")
        self._pids = itertools.count(1)
        self._order = itertools.count()
        self._running: dict[EngineId, Behaviour] = {}
        self._exited: set[EngineId] = set()
        self._script: list[tuple[float, int, LaunchEvent]] = []
        self._logs: dict[EngineId, tuple[str, ...]] = {}

    def start(self, engine: Engine, now: float) -> Started:
        """Bring an engine into being; `LaunchFailed` if the script refuses."""
        behaviour = self._behaviour(engine)
        self._logs[engine.id] = behaviour.last_lines
        if behaviour.refused is not None:
            raise LaunchFailed(behaviour.refused, last_lines=behaviour.last_lines)
        self._running[engine.id] = behaviour
        ready_at = now + behaviour.start_s
        if behaviour.fails is not None:
            self._at(ready_at, Exited(engine=engine.id, reason=behaviour.fails, last_lines=behaviour.last_lines))
        else:
            self._at(ready_at, Ready(engine=engine.id, phases_us={"listening": round(behaviour.start_s * 1e6)}))
            if behaviour.lives_s is not None:
                dies = Exited(engine=engine.id, reason="killed by SIGSEGV", last_lines=behaviour.last_lines)
                self._at(ready_at + behaviour.lives_s, dies)
        pid = next(self._pids)
        return Started(address=self._address_for(engine), pid=pid, pid_start=pid)

    def kill(self, engine: EngineId, now: float, *, reason: str = "killed by SIGKILL") -> None:
        """Have an engine exit now, whatever its script says."""
        if engine in self._running:
            self._script = [entry for entry in self._script if entry[2].engine != engine]
            heapq.heapify(self._script)
            self._at(now, Exited(engine=engine, reason=reason, last_lines=self._logs[engine]))

    def due(self, now: float) -> tuple[LaunchEvent, ...]:
        """What has happened until now and was not yet told, in order; engines that were stopped say nothing more."""
        events: list[LaunchEvent] = []
        while self._script and self._script[0][0] <= now:
            event = heapq.heappop(self._script)[2]
            if event.engine not in self._running or event.engine in self._exited:
                continue
            if isinstance(event, Exited):
                self._exited.add(event.engine)
            events.append(event)
        return tuple(events)

    def next_at(self) -> float | None:
        """When something happens next; `None` if nothing will by itself."""
        return self._script[0][0] if self._script else None

    def stop_s(self, engine: EngineId) -> float:
        """How long it takes until nothing is left of an engine, once told to stop."""
        behaviour = self._running.get(engine)
        return behaviour.stop_s if behaviour is not None and engine not in self._exited else 0.0

    def end(self, engine: EngineId) -> None:
        """Nothing is left of it."""
        self._running.pop(engine, None)
        self._exited.discard(engine)

    @property
    def running(self) -> frozenset[EngineId]:
        """Engines with a living process."""
        return frozenset(self._running) - self._exited

    @property
    def present(self) -> frozenset[EngineId]:
        """Engines of which anything is left."""
        return frozenset(self._running)

    def log_tail(self, engine: EngineId, lines: int) -> tuple[str, ...]:
        """The last lines of an engine's log."""
        return self._logs.get(engine, ())[-lines:] if lines > 0 else ()

    def _at(self, at: float, event: LaunchEvent) -> None:
        heapq.heappush(self._script, (at, next(self._order), event))


class Time(Protocol):
    """A clock that can be waited for."""

    def now(self) -> float:
        """Seconds since the epoch."""

    async def sleep(self, seconds: float) -> None:
        """Wait until that much time has passed."""


class WallTime:
    """The machine's time."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return wall_clock()

    async def sleep(self, seconds: float) -> None:
        """Wait in real time."""
        await asyncio.sleep(seconds)


class ManualTime:
    """Time that passes only when told to; for tests of what runs on an event loop."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Wait until `advance` has passed that much."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), sleeper))
        self._wake()
        await sleeper

    def advance(self, seconds: float) -> None:
        """Let time pass at once; who sleeps until then wakes when the loop comes to it."""
        self._now += seconds
        self._wake()

    def _wake(self) -> None:
        while self._sleepers and self._sleepers[0][0] <= self._now:
            sleeper = heapq.heappop(self._sleepers)[2]
            if not sleeper.done():
                sleeper.set_result(None)


class MemoryLauncher:
    """The `Launcher` over a `MemoryNode`; several may follow each other on one node, one at a time."""

    def __init__(self, node: MemoryNode, *, time: Time | None = None) -> None:
        self.node = node
        self._time = time or WallTime()
        self._changed = asyncio.Event()
        self._closed = False

    async def devices(self) -> tuple[Device, ...]:
        """See `Launcher.devices`."""
        return self.node.devices

    async def start(self, engine: Engine, model: Model) -> Started:  # noqa: ARG002 (a real launcher needs the model)
        """See `Launcher.start`."""
        started = self.node.start(engine, self._time.now())
        self._changed.set()
        return started

    async def adopt(self, engines: Sequence[Engine]) -> tuple[EngineId, ...]:
        """See `Launcher.adopt`."""
        known = {engine.id for engine in engines}
        for stray in self.node.present - known:
            self.node.end(stray)
        return tuple(engine.id for engine in engines if engine.id in self.node.running)

    async def stop(self, engine: Engine, *, grace_s: float) -> None:
        """See `Launcher.stop`."""
        takes_s = min(self.node.stop_s(engine.id), grace_s)
        if takes_s > 0:
            await self._time.sleep(takes_s)
        self.node.end(engine.id)

    async def events(self) -> AsyncIterator[LaunchEvent]:
        """See `Launcher.events`."""
        while not self._closed:
            for event in self.node.due(self._time.now()):
                yield event
            self._changed.clear()
            await self._until(self.node.next_at())

    async def _until(self, at: float | None) -> None:
        """Wait until that time, or until the script has changed."""
        waits: set[asyncio.Future[Any]] = {asyncio.ensure_future(self._changed.wait())}
        if at is not None:
            waits.add(asyncio.ensure_future(self._time.sleep(max(0.0, at - self._time.now()))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def kill(self, engine: EngineId, *, reason: str = "killed by SIGKILL") -> None:
        """Have an engine exit now."""
        self.node.kill(engine, self._time.now(), reason=reason)
        self._changed.set()

    def log_tail(self, engine: EngineId, lines: int) -> tuple[str, ...]:
        """See `Launcher.log_tail`."""
        return self.node.log_tail(engine, lines)

    async def close(self) -> None:
        """See `Launcher.close`."""
        self._closed = True
        self._changed.set()
