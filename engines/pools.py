"""What the controller knows of a pool besides its engines: settings from variants, history from reports and starts.

Pure. Settings are per variant, decisions per pool: variants that agree on the engine spec share a pool, so what they
ask for is added up (`provisioned`) or the longest taken (`idle_timeout_s`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from engines import footprint
from engines.demand import PoolTotals
from engines.model import EngineSpec, Footprint, Model, PoolFailure, PoolId, Variant

DEFAULT_START_S: Final = 5.0
"""How long a start is expected to take in a pool that never had one."""


class PoolConfig(Struct, frozen=True, kw_only=True):
    """What the variants of a pool ask for, together."""

    pool: PoolId
    spec: EngineSpec
    model: Model
    provisioned: int
    """Provisioned concurrency of all its variants, in slots."""
    idle_timeout_s: float
    """The longest keep-alive of its variants; stands in until it is known which of them are used."""
    footprint: Footprint
    promised_to: str | None
    """`workspace/variant` with most provisioned concurrency: the cause of an engine that no request asked for."""

    @property
    def slots(self) -> int:
        """Sequences that one engine of the pool runs at once."""
        return self.spec.slots


def of(variants: Iterable[Variant]) -> dict[PoolId, PoolConfig]:
    """Group variants by the pool that serves them."""
    groups: dict[PoolId, list[Variant]] = {}
    for variant in sorted(variants, key=lambda v: (v.workspace, v.name)):
        groups.setdefault(variant.spec.pool, []).append(variant)
    return {pool: _config(pool, group) for pool, group in groups.items()}


def _config(pool: PoolId, variants: list[Variant]) -> PoolConfig:
    first = variants[0]
    owner = max(variants, key=lambda v: v.scaling.provisioned)
    return PoolConfig(
        pool=pool,
        spec=first.spec,
        model=first.model,
        provisioned=sum(v.scaling.provisioned for v in variants),
        idle_timeout_s=max(v.scaling.idle_timeout_s for v in variants),
        footprint=footprint.estimate(first.model, first.arguments),
        promised_to=f"{owner.workspace}/{owner.name}" if owner.scaling.provisioned else None,
    )


class PoolHistory(Struct, frozen=True, kw_only=True):
    """What has been seen of a pool, as far as decisions need it."""

    since: float
    """When this controller began to watch; of what was before, it knows nothing."""
    last_used_at: float = 0.0
    """When a request last arrived or ended, or an operator asked for an engine; 0 if not since `since`."""
    idle_timeout_s: float | None = None
    """The longest keep-alive among the variants used, as gateways last reported it."""
    needed_at: tuple[float, ...] = ()
    """At index k: when more than k engines were last needed."""
    waiting_since: float | None = None
    """Since when there have been holds without a break."""
    queue: QueueStart | None = None
    """How the queue looked when its watching began; see `scaling`."""
    wanted_until: float = 0.0
    """Until then an engine is to be started though no request asks for it (`prewarm`), unless one has become ready."""
    start_s: float = DEFAULT_START_S
    failure: PoolFailure | None = None


class QueueStart(Struct, frozen=True):
    """A pool with ready engines, no start under way and holds: from here the speed of its queue is measured."""

    at: float
    arrivals: int
    in_system: int
    """Slots in use and wanted at that time."""


def observe(history: PoolHistory, totals: PoolTotals, *, slots: int, settled: bool, now: float) -> PoolHistory:
    """The history after a look at the demand.

    `settled`: engines are ready and none is on its way, so holds say something about the speed of the queue.
    """
    in_system = totals.running + totals.waiting
    needed = -(-in_system // slots)
    needed_at = history.needed_at
    if needed:
        needed_at = (now,) * needed + needed_at[needed:]
    return replace(
        history,
        last_used_at=max(history.last_used_at, totals.last_used_at, now if in_system else 0.0),
        idle_timeout_s=totals.idle_timeout_s if totals.last_used_at else history.idle_timeout_s,
        needed_at=needed_at,
        waiting_since=_since(history.waiting_since, totals.waiting > 0, now),
        queue=_queue(history.queue, totals, settled=settled, now=now),
    )


def _since(since: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if since is None else since


def _queue(queue: QueueStart | None, totals: PoolTotals, *, settled: bool, now: float) -> QueueStart | None:
    if not settled or totals.waiting == 0:
        return None
    return queue or QueueStart(at=now, arrivals=totals.arrivals, in_system=totals.running + totals.waiting)


def failed(history: PoolHistory, reason: str, *, backoff_s: float, backoff_max_s: float, now: float) -> PoolHistory:
    """The history after a failed start: the wait until the next one doubles with each failure in a row."""
    failures = 1 + (history.failure.failures if history.failure else 0)
    wait_s = min(backoff_s * 2.0 ** min(failures - 1, 32), backoff_max_s)
    return replace(history, failure=PoolFailure(reason=reason, failures=failures, retry_at=now + wait_s))


def succeeded(history: PoolHistory, *, start_s: float) -> PoolHistory:
    """The history after a start that took `start_s`; a `prewarm` has got what it wanted."""
    return replace(history, start_s=start_s, failure=None, wanted_until=0.0)


def prewarm(history: PoolHistory, *, idle_timeout_s: float, now: float) -> PoolHistory:
    """The history after an operator asked for an engine; counts as use."""
    return replace(history, last_used_at=max(history.last_used_at, now), wanted_until=now + idle_timeout_s)


def unwanted(history: PoolHistory) -> PoolHistory:
    """The history after an operator stopped an engine: a `prewarm` no longer holds."""
    return replace(history, wanted_until=0.0)
