"""One pool as one gateway sees it (pure): what the fleet says of it, what runs and waits here, and what follows.

`now` is seconds on a clock that only moves forward, `wall` seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from engines import pools
from engines.lifecycle import PENDING, SERVING
from engines.model import Engine, PoolDemand, PoolFailure, PoolId, PoolStatus
from engines.waiting import Hold, Queue


class Availability(StrEnum):
    """What a caller may expect of a model."""

    READY = "ready"
    LOADING = "loading"
    COLD = "cold"
    """No engine, none on its way: a request would start one."""
    FAILED = "failed"
    """The last start failed and the next is not due yet."""


@dataclass(slots=True)
class PoolView:
    """What a gateway knows of a pool; changed by its owner only."""

    id: PoolId
    queue: Queue
    unready_since: float | None
    """Since when no engine has been ready; `None` while one is."""
    engines: tuple[Engine, ...] = ()
    status: PoolStatus | None = None
    running: dict[str, int] = field(default_factory=dict)
    """Requests at engines by `workspace/variant`."""
    slots_used: int = 0
    keep_alive: dict[str, float] = field(default_factory=dict)
    """Idle time-outs of the variants used since the pool last had no ready engine."""
    arrivals: int = 0
    last_used_at: float = 0.0
    unready_before_s: float = 0.0
    """How long no engine was ready, without the time since `unready_since`."""

    @property
    def ready(self) -> bool:
        """An engine takes requests."""
        return self.unready_since is None

    @property
    def pending(self) -> bool:
        """An engine is on its way."""
        return any(engine.state in PENDING for engine in self.engines)

    def unready_s(self, now: float) -> float:
        """How long, in all, this pool has had no ready engine since this gateway knows it."""
        return self.unready_before_s + (now - self.unready_since if self.unready_since is not None else 0.0)

    def arrived(self, variant: str, idle_timeout_s: float, wall: float) -> None:
        """A request has come."""
        self.arrivals += 1
        self.last_used_at = wall
        self.keep_alive[variant] = idle_timeout_s

    def began(self, hold: Hold) -> None:
        """A request has gone to an engine."""
        self.running[hold.variant] = self.running.get(hold.variant, 0) + 1
        self.slots_used += hold.slots

    def ended(self, hold: Hold, wall: float) -> None:
        """An engine is done with a request."""
        self.running[hold.variant] -= 1
        if not self.running[hold.variant]:
            del self.running[hold.variant]
        self.slots_used -= hold.slots
        self.last_used_at = wall

    def update(self, engines: Iterable[Engine], status: PoolStatus | None, now: float) -> None:
        """Take over what a newer fleet says.

        When the last ready engine goes, so do the keep-alives of variants that neither run nor wait.
        """
        self.engines, self.status = tuple(engines), status
        ready = any(engine.state in SERVING for engine in self.engines)
        if ready and self.unready_since is not None:
            self.unready_before_s = self.unready_s(now)
            self.unready_since = None
        elif not ready and self.unready_since is None:
            self.unready_since = now
            in_use = self.running.keys() | {hold.variant for hold in self.queue.holds}
            self.keep_alive = {name: timeout for name, timeout in self.keep_alive.items() if name in in_use}

    def failure(self, wall: float) -> PoolFailure | None:
        """Why waiting makes no sense: nothing is ready or on its way, and no start is tried before `retry_at`."""
        failure = self.status.failure if self.status is not None else None
        if failure is None or self.ready or self.pending:
            return None
        return failure if failure.retry_at > wall else None

    @property
    def blocked(self) -> str | None:
        """Why no engine can be placed just now."""
        return self.status.blocked if self.status is not None else None

    def eta_s(self, wall: float) -> float:
        """Seconds until an engine may be ready if one is (or were) started, at least one."""
        expected_s = self.status.start_s if self.status is not None else pools.DEFAULT_START_S
        began = [engine.created_at for engine in self.engines if engine.state in PENDING]
        return max(1.0, expected_s - (wall - min(began) if began else 0.0))

    def availability(self, wall: float) -> tuple[Availability, float | None]:
        """What to expect, and in how many seconds the pool may be ready (`None`: can't be said)."""
        if self.ready:
            return Availability.READY, 0.0
        if self.failure(wall) is not None:
            return Availability.FAILED, None
        if self.pending or self.queue:
            return Availability.LOADING, self.eta_s(wall)
        return Availability.COLD, self.eta_s(wall)

    def demand(self) -> PoolDemand:
        """What the controller needs to know."""
        oldest = self.queue.oldest
        return PoolDemand(
            running=self.slots_used,
            waiting=self.queue.slots,
            arrivals=self.arrivals,
            last_used_at=self.last_used_at,
            idle_timeout_s=max(self.keep_alive.values(), default=0.0),
            caused_by=oldest.variant if oldest is not None else None,
        )
