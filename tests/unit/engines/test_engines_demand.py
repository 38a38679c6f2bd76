"""What all gateways together want."""

from __future__ import annotations

from deciding import engine_id, gateway, report

from engines import demand
from engines.demand import PoolTotals, Reports
from engines.model import Demand, PoolDemand, PoolId

POOL = PoolId("p")
OTHER = PoolId("q")


def received(*reports: Demand, at: float = 0.0) -> Reports:
    held: Reports = {}
    for one in reports:
        held = demand.receive(held, one, at)
    return held


def test_totals_add_up_over_gateways() -> None:
    reports = received(
        report(1, pools={POOL: PoolDemand(running=2, waiting=1, arrivals=10, last_used_at=5.0, idle_timeout_s=60.0)}),
        report(
            2,
            pools={
                POOL: PoolDemand(running=3, arrivals=7, last_used_at=9.0, idle_timeout_s=30.0, caused_by="acme/bot"),
                OTHER: PoolDemand(waiting=4),
            },
        ),
    )
    assert demand.totals(reports) == {
        POOL: PoolTotals(
            running=5, waiting=1, arrivals=17, last_used_at=9.0, idle_timeout_s=60.0, caused_by="acme/bot"
        ),
        OTHER: PoolTotals(waiting=4),
    }


def test_a_later_report_replaces_the_gateways_last() -> None:
    reports = received(report(1, at=1.0, pool=POOL, waiting=5), report(1, at=2.0, pool=POOL, waiting=1))
    assert demand.totals(reports) == {POOL: PoolTotals(waiting=1)}


def test_a_report_that_was_overtaken_changes_nothing() -> None:
    reports = received(report(1, at=2.0, pool=POOL, waiting=1), report(1, at=1.0, pool=POOL, waiting=5))
    assert demand.totals(reports) == {POOL: PoolTotals(waiting=1)}


def test_a_report_counts_for_five_seconds_from_its_receipt() -> None:
    reports = received(report(1, at=-3600.0), at=10.0)  # its clock is an hour slow
    assert demand.expire(reports, 14.9) == reports
    assert demand.expire(reports, 15.0) == {}


def test_a_leaving_gateway_counts_until_nothing_is_in_flight() -> None:
    busy = report(1, at=1.0, leaving=True, engines={engine_id(1): 2})
    assert set(received(busy)) == {gateway(1)}
    assert received(busy, report(1, at=2.0, leaving=True)) == {}


def test_requests_in_flight_add_up_by_engine() -> None:
    reports = received(
        report(1, engines={engine_id(1): 2, engine_id(2): 1}), report(2, engines={engine_id(1): 3, engine_id(3): 0})
    )
    assert demand.in_flight(reports) == {engine_id(1): 5, engine_id(2): 1}


def test_the_slowest_gateway_says_what_is_acknowledged() -> None:
    assert demand.acknowledged({}) is None
    reports = received(report(1, epoch=2, version=1), report(2, epoch=1, version=99), report(3, epoch=2, version=4))
    assert demand.acknowledged(reports) == (1, 99)
