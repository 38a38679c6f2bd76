"""What can be decided about engines, as values, and what is known of one that drains. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from engines.model import DeviceId, EngineId, PoolId


class Reason(StrEnum):
    """Why an engine drains or stops: log field and metric label alike."""

    IDLE = "idle"
    """Its keep-alive is over."""
    PRESSURE = "pressure"
    """Another pool needs its memory."""
    UNNAMED = "unnamed"
    """No variant names its pool any more."""
    OPERATOR = "operator"
    """An operator asked for it."""
    SHUTDOWN = "shutdown"
    """The installation stops."""
    ADOPTED = "adopted"
    """It drained under an earlier controller, whose reason isn't known."""


REVERSIBLE: Final = frozenset({Reason.IDLE, Reason.PRESSURE})
"""An engine that drains for one of these goes back to work if its pool wants it."""


class Start(Struct, frozen=True, kw_only=True):
    """Reserve memory and start an engine of a pool."""

    pool: PoolId
    device: DeviceId
    memory_bytes: int
    caused_by: str | None


class Drain(Struct, frozen=True):
    """Give a ready engine nothing new."""

    engine: EngineId
    reason: Reason


class Undrain(Struct, frozen=True):
    """Take a draining engine back."""

    engine: EngineId


class Probe(Struct, frozen=True):
    """Ask a draining engine whether it has anything in flight."""

    engine: EngineId


class Stop(Struct, frozen=True):
    """End a drained engine."""

    engine: EngineId
    reason: Reason


Action = Start | Drain | Undrain | Probe | Stop


class Draining(Struct, frozen=True):
    """What the controller knows of an engine that drains."""

    reason: Reason
    version: int
    """The version of the fleet that is the first to show it."""
    empty: bool = False
    """The engine itself has said, after every gateway knew, that it has nothing in flight (or didn't answer)."""
