"""When an engine that nobody needs leaves."""

from __future__ import annotations

import pytest
from deciding import engine, variant

from engines import keepalive, pools
from engines.pools import PoolHistory

BOT = variant("a", idle_timeout_s=600.0)
CONFIG = pools.of([BOT])[BOT.spec.pool]


def over(now: float, history: PoolHistory, *, count: int = 1, ready_at: float = 100.0) -> bool:
    return keepalive.over(engine(1, BOT, ready_at=ready_at), CONFIG, history, count=count, now=now)


@pytest.mark.parametrize(
    ("history", "ends"),
    [
        (PoolHistory(since=0.0), 700.0),  # never used: from when it was ready
        (PoolHistory(since=0.0, last_used_at=300.0), 900.0),
        (PoolHistory(since=0.0, last_used_at=50.0), 700.0),
        (PoolHistory(since=0.0, last_used_at=300.0, idle_timeout_s=5.0), 305.0),  # only a variant of 5 s is in use
        (PoolHistory(since=0.0, last_used_at=300.0, idle_timeout_s=0.0), 300.0),
    ],
)
def test_the_first_engine_stays_for_the_time_out_after_the_last_use(history: PoolHistory, ends: float) -> None:
    assert not over(ends - 0.001, history)
    assert over(ends, history)


def test_the_second_engine_stays_for_the_time_out_after_two_were_needed() -> None:
    history = PoolHistory(since=0.0, last_used_at=5000.0, needed_at=(5000.0, 400.0))
    assert not over(999.0, history, count=2)
    assert over(1000.0, history, count=2)
    assert not over(1000.0, history, count=1)


def test_what_a_new_controller_has_not_seen_counts_from_its_start() -> None:
    history = PoolHistory(since=1000.0, last_used_at=1500.0, needed_at=(1500.0,))
    assert not over(1599.0, history, count=2)
    assert over(1600.0, history, count=2)
