"""Which engine takes a request (pure).

Filter (ready, enough free slots), score (free slots), pick. The caller says what is in flight, keeps the fleet and does
what comes of the answer. A gateway counts only its own requests: what two gateways send beyond an engine's slots waits
in the engine's own queue.

Only engines that the newest known fleet calls READY are candidates; there is no other way to an engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from msgspec import Struct

from engines.lifecycle import SERVING
from engines.model import Engine, EngineId, PoolId


class Refused(StrEnum):
    """Why there is no route."""

    NO_ENGINE = "no_engine"
    """No engine of the pool is ready."""
    NO_SLOT = "no_slot"
    """Engines are ready, but none has enough free slots."""


class Candidate(Struct, frozen=True):
    """A ready engine and how many of its slots this gateway has in use."""

    engine: EngineId
    slots: int
    used: int

    @property
    def free(self) -> int:
        """Slots that are left; below zero if the spec shrank under running requests."""
        return self.slots - self.used


class Route(Struct, frozen=True):
    """The engine that takes it."""

    engine: EngineId


class NoRoute(Struct, frozen=True):
    """Nobody takes it now."""

    reason: Refused


def candidates(
    engines: Iterable[Engine], pool: PoolId, used: Mapping[EngineId, int], suspects: Collection[EngineId] = ()
) -> tuple[Candidate, ...]:
    """The engines of a pool that take new requests.

    `used`: this gateway's slots in use by engine. `suspects`: engines that failed it just now.
    """
    return tuple(
        Candidate(engine.id, engine.slots, used.get(engine.id, 0))
        for engine in engines
        if engine.pool == pool and engine.state in SERVING and engine.address is not None and engine.id not in suspects
    )


def pick(among: Iterable[Candidate], slots: int) -> Route | NoRoute:
    """The candidate with most free slots, of those that have enough; the lowest id (the oldest) of equals."""
    reason = Refused.NO_ENGINE
    best: Candidate | None = None
    for candidate in among:
        reason = Refused.NO_SLOT
        if candidate.free < slots:
            continue
        if best is None or (-candidate.free, candidate.engine) < (-best.free, best.engine):
            best = candidate
    return Route(best.engine) if best is not None else NoRoute(reason)
