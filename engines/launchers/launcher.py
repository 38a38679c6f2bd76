"""How the controller starts, watches and stops engines: the seam between deciding and doing.

A launcher owns processes, never states: it reports what it sees as `LaunchEvent`s and the controller writes the states.
`local` asks the engine host of this machine; `memory` is scripted, for tests and simulation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from msgspec import Struct

from engines.model import Device, Engine, EngineId, Model


class Started(Struct, frozen=True, kw_only=True):
    """A process that now exists; it is not ready yet."""

    address: str
    pid: int
    pid_start: int


class Ready(Struct, frozen=True, kw_only=True):
    """The engine's server listens and answered its health check."""

    engine: EngineId
    phases_us: dict[str, int]


class Exited(Struct, frozen=True, kw_only=True):
    """The engine's leader is gone; members of its group may still be there until `stop` has returned."""

    engine: EngineId
    reason: str
    """For operators: exit status or signal."""
    last_lines: tuple[str, ...] = ()
    """The end of its log."""


LaunchEvent = Ready | Exited


class Launcher(Protocol):
    """What the controller needs of a node."""

    async def devices(self) -> tuple[Device, ...]:
        """What engines can be placed on."""
        ...

    async def start(self, engine: Engine, model: Model) -> Started:
        """Fork a process for a placed engine; returns once it exists. `LaunchFailed` or `LaunchRefused` if not."""
        ...

    async def adopt(self, engines: Sequence[Engine]) -> tuple[EngineId, ...]:
        """Watch engines that an earlier controller started and return those whose process is alive.

        Processes of this installation that are in nobody's list are stopped.
        """
        ...

    async def stop(self, engine: Engine, *, grace_s: float) -> None:
        """End the process group: SIGTERM, then SIGKILL after the grace; returns when no living member is left.

        Its socket, temporary directory and shared memory are gone too. Also right for a group that has died already.
        """
        ...

    def events(self) -> AsyncIterator[LaunchEvent]:
        """What happens to engines that were started or adopted; ends when the launcher is closed."""
        ...

    def log_tail(self, engine: EngineId, lines: int) -> tuple[str, ...]:
        """The last lines of an engine's log, oldest first; empty if there is none."""
        ...

    async def close(self) -> None:
        """Stop watching; engines live on."""
        ...
