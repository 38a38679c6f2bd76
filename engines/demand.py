"""What all gateways together want: their last reports, added up. Pure.

A report counts for `REPORT_LIFE_S` from its receipt (by the controller's clock: gateways' clocks may differ). A gateway
that has not reported for so long is taken for dead; what it had sent to engines may still run there, so before an
engine is stopped the engine itself is asked as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from engines.model import Demand, EngineId, GatewayId, PoolDemand, PoolId

REPORT_LIFE_S: Final = 5.0
"""How long a report counts; gateways send one at least every half second."""


class Report(Struct, frozen=True):
    """A gateway's last report and when it came."""

    demand: Demand
    received_at: float


Reports = Mapping[GatewayId, Report]


def receive(reports: Reports, demand: Demand, now: float) -> Reports:
    """The reports with this one over its gateway's last; one that was overtaken on its way changes nothing.

    A gateway that is leaving and has nothing in flight any more is dropped: it will acknowledge nothing.
    """
    last = reports.get(demand.gateway)
    if last is not None and demand.at < last.demand.at:
        return reports
    rest = {gateway: report for gateway, report in reports.items() if gateway != demand.gateway}
    if demand.leaving and not demand.engines:
        return rest
    return rest | {demand.gateway: Report(demand, now)}


def expire(reports: Reports, now: float) -> Reports:
    """The reports that still count."""
    if all(report.received_at > now - REPORT_LIFE_S for report in reports.values()):
        return reports
    return {gateway: report for gateway, report in reports.items() if report.received_at > now - REPORT_LIFE_S}


class PoolTotals(Struct, frozen=True, kw_only=True):
    """What all gateways have for one pool; fields as in `PoolDemand`."""

    running: int = 0
    waiting: int = 0
    arrivals: int = 0
    last_used_at: float = 0.0
    idle_timeout_s: float = 0.0
    caused_by: str | None = None


NOTHING: Final = PoolTotals()


def totals(reports: Reports) -> dict[PoolId, PoolTotals]:
    """Per pool, the sum over the gateways (times and time-outs: the latest and longest)."""
    by_pool: dict[PoolId, list[PoolDemand]] = {}
    for report in reports.values():
        for pool, demand in report.demand.pools.items():
            by_pool.setdefault(pool, []).append(demand)
    return {pool: _sum(demands) for pool, demands in by_pool.items()}


def _sum(demands: list[PoolDemand]) -> PoolTotals:
    return PoolTotals(
        running=sum(d.running for d in demands),
        waiting=sum(d.waiting for d in demands),
        arrivals=sum(d.arrivals for d in demands),
        last_used_at=max(d.last_used_at for d in demands),
        idle_timeout_s=max(d.idle_timeout_s for d in demands),
        caused_by=next((d.caused_by for d in demands if d.caused_by), None),
    )


def in_flight(reports: Reports) -> dict[EngineId, int]:
    """Requests in flight by engine, over all gateways; engines without any are left out."""
    counts: dict[EngineId, int] = {}
    for report in reports.values():
        for engine, count in report.demand.engines.items():
            if count:
                counts[engine] = counts.get(engine, 0) + count
    return counts


def acknowledged(reports: Reports) -> tuple[int, int] | None:
    """The oldest `(epoch, version)` of the fleet among the gateways; `None` without any gateway."""
    return min(_versions(reports.values()), default=None)


def _versions(reports: Iterable[Report]) -> Iterable[tuple[int, int]]:
    return ((report.demand.fleet_epoch, report.demand.fleet_version) for report in reports)
