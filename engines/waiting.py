"""The queue of one pool in one gateway (pure): who waits, and who goes next.

First come, first served, with one exception: a request whose variant is at its own cap (`max_concurrency`) is passed
over by those behind it. Nobody overtakes a request that only waits for more slots, so a wide one is not starved by
narrow ones. What happens to those that go is the caller's business, and so are deadlines.

The cap counts this gateway's requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from engines.model import EngineId
from engines.routing import Candidate, NoRoute, pick


class Hold(Struct, frozen=True, kw_only=True):
    """A request that waits for an engine or a slot."""

    id: int
    """Rises with arrival."""
    variant: str
    """`workspace/variant`."""
    slots: int
    cap: int | None = None
    """Requests of its variant that may run at once."""


class Dispatch(Struct, frozen=True):
    """A hold that is over: this engine takes it."""

    hold: Hold
    engine: EngineId


class Queue:
    """The holds of one pool, in order of arrival; at most `length`."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._holds: dict[int, Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def slots(self) -> int:
        """Slots wanted by all holds."""
        return sum(hold.slots for hold in self._holds.values())

    @property
    def oldest(self) -> Hold | None:
        """Who has waited longest."""
        return next(iter(self._holds.values()), None)

    @property
    def holds(self) -> tuple[Hold, ...]:
        """All, the oldest first."""
        return tuple(self._holds.values())

    def enter(self, hold: Hold) -> bool:
        """Let it wait; `False` if the queue is full."""
        if len(self._holds) >= self._length:
            return False
        self._holds[hold.id] = hold
        return True

    def leave(self, hold_id: int) -> bool:
        """Free its place; `False` if it wasn't there any more."""
        return self._holds.pop(hold_id, None) is not None

    def next(self, among: Iterable[Candidate], running: Mapping[str, int]) -> tuple[Dispatch, ...]:
        """Who goes now, and where to; they stay in the queue until they `leave`.

        `running`: requests at engines by variant.
        """
        engines = {candidate.engine: candidate for candidate in among}
        started: dict[str, int] = {}
        dispatched: list[Dispatch] = []
        for hold in self._holds.values():
            if not may_run(hold, running.get(hold.variant, 0) + started.get(hold.variant, 0)):
                continue
            route = pick(engines.values(), hold.slots)
            if isinstance(route, NoRoute):
                break
            chosen = engines[route.engine]
            engines[route.engine] = Candidate(chosen.engine, chosen.slots, chosen.used + hold.slots)
            started[hold.variant] = started.get(hold.variant, 0) + 1
            dispatched.append(Dispatch(hold, route.engine))
        return tuple(dispatched)


def may_run(hold: Hold, running: int) -> bool:
    """Whether its variant's cap leaves room for one more besides those running."""
    return hold.cap is None or running < hold.cap
