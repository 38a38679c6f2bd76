"""How many engines a pool should have."""

from __future__ import annotations

import pytest
from deciding import variant

from engines import pools, scaling
from engines.demand import PoolTotals
from engines.pools import PoolConfig, PoolHistory, QueueStart

MOST = 4
CONFIG = pools.of([variant("a", slots=16)])[variant("a", slots=16).spec.pool]


def promising(provisioned: int) -> PoolConfig:
    return next(iter(pools.of([variant("a", slots=16, provisioned=provisioned)]).values()))


def demanded(
    totals: PoolTotals, *, ready: int, pending: int = 0, history: PoolHistory | None = None, now: float = 0.0
) -> int:
    history = history or PoolHistory(since=0.0)
    return scaling.demanded(CONFIG, totals, history, ready=ready, pending=pending, most=MOST, now=now)


@pytest.mark.parametrize(("provisioned", "engines"), [(0, 0), (1, 1), (16, 1), (17, 2), (1000, MOST)])
def test_promises_are_rounded_up_to_whole_engines_within_the_operators_maximum(provisioned: int, engines: int) -> None:
    assert scaling.promised(promising(provisioned), most=MOST) == engines


@pytest.mark.parametrize("waiting", [1, 16, 50, 5000])
def test_i6_however_many_wait_for_a_cold_pool_one_engine_is_demanded(waiting: int) -> None:
    assert demanded(PoolTotals(waiting=waiting), ready=0) == 1
    assert demanded(PoolTotals(waiting=waiting), ready=0, pending=1) == 1


def test_requests_that_a_draining_engine_finishes_demand_no_other() -> None:
    assert demanded(PoolTotals(running=5), ready=0) == 0


@pytest.mark.parametrize(
    ("running", "waiting", "ready", "pending", "engines"),
    [
        (0, 0, 2, 0, 0),
        (3, 0, 1, 0, 1),
        (10, 3, 1, 0, 1),  # has slots: the gateways will place them
        (17, 0, 2, 0, 2),
        (40, 0, 2, 0, 2),  # nobody waits
        (16, 30, 1, 1, 2),  # one is on its way
        (16, 300, 1, 2, 3),
    ],
)
def test_what_is_there_is_kept_as_long_as_it_takes(
    running: int, waiting: int, ready: int, pending: int, engines: int
) -> None:
    assert demanded(PoolTotals(running=running, waiting=waiting), ready=ready, pending=pending) == engines


def queue(done: int, *, waiting: int, elapsed: float, start_s: float = 2.0) -> int:
    """What is demanded when 50 were in the system `elapsed` ago, 16 run, and `done` are done since."""
    arrivals = 16 + waiting + done
    history = PoolHistory(since=0.0, start_s=start_s, queue=QueueStart(at=100.0, arrivals=50, in_system=50))
    totals = PoolTotals(running=16, waiting=waiting, arrivals=arrivals)
    return demanded(totals, ready=1, history=history, now=100.0 + elapsed)


@pytest.mark.parametrize(
    ("done", "waiting", "elapsed", "engines"),
    [
        (0, 34, 4.9, 1),  # too early to say
        (0, 34, 5.0, 2),  # 8 half done in 5 s: 21 s more
        (16, 18, 5.0, 2),  # 24 in 5 s: 3.8 s more, a start takes 2
        (32, 2, 5.0, 1),  # 40 in 5 s: 0.3 s more
        (32, 16, 5.0, 1),  # 40 in 5 s: 2.0 s more
        (32, 17, 5.0, 2),
    ],
)
def test_another_engine_starts_only_if_it_comes_before_the_queue_is_gone(
    done: int, waiting: int, elapsed: float, engines: int
) -> None:
    assert queue(done, waiting=waiting, elapsed=elapsed) == engines


def test_a_pool_that_starts_slowly_is_watched_for_as_long_as_a_start_takes() -> None:
    assert queue(0, waiting=34, elapsed=39.0, start_s=40.0) == 1
    assert queue(0, waiting=3400, elapsed=41.0, start_s=40.0) == 2


def test_demand_stays_within_the_operators_maximum() -> None:
    history = PoolHistory(since=0.0, queue=QueueStart(at=0.0, arrivals=0, in_system=0))
    assert demanded(PoolTotals(running=64, waiting=900), ready=MOST, history=history, now=60.0) == MOST


def test_a_prewarm_demands_one_engine_while_none_is_ready() -> None:
    history = PoolHistory(since=0.0, wanted_until=10.0)
    assert demanded(PoolTotals(), ready=0, history=history, now=9.0) == 1
    assert demanded(PoolTotals(), ready=0, history=history, now=10.0) == 0
