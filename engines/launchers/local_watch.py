"""Watches one engine of this machine: is it getting on, is it ready, has it ended?

A watch owns a pidfd of the engine's leader, which tells its end whoever its parent is, and one task. While the engine
starts it looks, every few milliseconds, for new phases, a longer log and a server that accepts connections; then it
asks for `/health`. A start is bounded by progress: it has failed after `silence_s` without a new phase or a longer log,
and after `SILENCES` times that in any case, since a log can grow in circles.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
import structlog
from msgspec import Struct

from engines.host import group
from engines.host.layout import Layout
from engines.launchers import local_log, local_remains
from engines.launchers.launcher import Exited, LaunchEvent, Ready
from engines.launchers.local_process import process_end
from engines.launchers.local_remains import Leader
from engines.model import EngineId

POLL_S: Final = 0.01
SLOW_POLL_S: Final = 0.1
"""Between looks at a start that has taken longer than `QUICK_S`."""
QUICK_S: Final = 30.0
HEALTH_S: Final = 2.0
NO_FORK_S: Final = 5.0
"""A start as long as this is hardly a fork, and stock engines leave shared memory if they are killed: note it early."""
SETTLED_S: Final = 2.0
"""Otherwise shared memory is noted so long after an engine got ready, off the way of the first request."""
SILENCES: Final = 12
LAST_LINES: Final = 40

log = structlog.get_logger()


class _Stamp(Struct, frozen=True):
    phase: str
    at_us: int


class Watch:
    """One engine's leader; `events` gets `Ready` (unless it was ready before) and then `Exited`, each at most once."""

    def __init__(
        self,
        leader: Leader,
        layout: Layout,
        *,
        ready: bool,
        silence_s: float,
        exit_status: Callable[[EngineId], Awaitable[int | None]],
        events: Callable[[LaunchEvent], None],
    ) -> None:
        self.leader = leader
        self.layout = layout
        self._ready = ready
        self._silence_s = silence_s
        self._exit_status = exit_status
        self._events = events
        self._task = asyncio.create_task(self._run(), name=f"watch {leader.engine}")

    async def close(self) -> None:
        """Stop watching; no event comes any more."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            with process_end(self.leader.pid, self.leader.pid_start) as ended:
                reason = None if self._ready else await self._become_ready(ended)
                if not await _within(SETTLED_S, ended):
                    await asyncio.to_thread(self._note_shared_memory)
                await ended.wait()
            await asyncio.to_thread(self._note_shared_memory)
            reason = reason or _describe(await self._exit_status(self.leader.engine))
            self._events(Exited(engine=self.leader.engine, reason=reason, last_lines=self._last_lines()))
        except Exception:
            log.exception("watch_failed", engine=self.leader.engine)
            self._events(Exited(engine=self.leader.engine, reason="watching it failed", last_lines=self._last_lines()))

    async def _become_ready(self, ended: asyncio.Event) -> str | None:
        """Wait for the end of the start, good or bad; a reason if the engine was killed for getting nowhere."""
        began = progress_at = time.monotonic()
        phases = written = -1
        while not ended.is_set():
            now = time.monotonic()
            before, phases, written = (phases, written), _size(self.layout.phases), _size(self.layout.log)
            if before != (phases, written):
                progress_at = now
            if before[0] != phases and now - began > NO_FORK_S:
                await asyncio.to_thread(self._note_shared_memory)
            if self._accepts() and await self._healthy():
                took = durations_us(_stamps(self.layout.phases), self.leader.asked_us)
                self._events(Ready(engine=self.leader.engine, phases_us=took))
                return None
            if now - progress_at > self._silence_s or now - began > SILENCES * self._silence_s:
                return await self._give_up(now - began)
            await _within(POLL_S if now - began < QUICK_S else SLOW_POLL_S, ended)
        return None

    async def _give_up(self, after_s: float) -> str:
        stamps = _stamps(self.layout.phases)
        last = max(stamps, key=lambda stamp: stamp.at_us).phase if stamps else "nothing"
        await asyncio.to_thread(group.kill, self.leader.pid, self.leader.pid_start)
        return (
            f"no progress for {self._silence_s:g} s, {after_s:.0f} s after its start; the last that it reached: {last}"
        )

    def _accepts(self) -> bool:
        """Whether somebody listens on the engine's socket; never blocks."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(str(self.layout.socket))
            except OSError:
                return False
            return True

    async def _healthy(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=HEALTH_S)
        connector = aiohttp.UnixConnector(str(self.layout.socket))
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                async with session.get("http://engine/health") as response:
                    return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _note_shared_memory(self) -> None:
        local_remains.note_shared_memory(self.layout, group.members(self.leader.pid))

    def _last_lines(self) -> tuple[str, ...]:
        return local_log.tail(self.layout.log, LAST_LINES)


def durations_us(stamps: tuple[_Stamp, ...], asked_us: int | None) -> dict[str, int]:
    """Microseconds that each phase took; the first counts from `asked_us`, or not at all if that is unknown.

    A phase that was stamped more than once, by several workers, has ended when the last of them has.
    """
    ends: dict[str, int] = {}
    for stamp in stamps:
        ends[stamp.phase] = max(stamp.at_us, ends.get(stamp.phase, 0))
    durations = {}
    before = asked_us
    for phase, end in sorted(ends.items(), key=lambda item: item[1]):
        if before is not None:
            durations[phase] = max(0, end - before)
        before = end
    return durations


def _stamps(file: Path) -> tuple[_Stamp, ...]:
    """The whole lines of a phases file."""
    try:
        whole = file.read_bytes().rpartition(b"\n")[0]
        return tuple(msgspec.json.decode(line, type=_Stamp) for line in whole.splitlines())
    except (OSError, msgspec.DecodeError):
        return ()


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether the event was set within this time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _describe(status: int | None) -> str:
    if status is None:
        return "ended; the engine host can't say how"
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
