"""Pools from variants, and what is remembered of them."""

from __future__ import annotations

from deciding import variant

from engines import pools
from engines.demand import PoolTotals
from engines.model import PoolFailure
from engines.pools import PoolHistory, QueueStart


def look(history: PoolHistory, now: float, *, settled: bool = True, slots: int = 4, **totals: float) -> PoolHistory:
    return pools.observe(history, PoolTotals(**totals), slots=slots, settled=settled, now=now)  # type: ignore[arg-type]


def test_variants_of_one_spec_share_a_pool_and_add_up_what_they_ask_for() -> None:
    one = variant("a", name="one", idle_timeout_s=60.0, provisioned=2)
    two = variant("a", name="two", workspace="zeta", idle_timeout_s=600.0, provisioned=3)
    other = variant("b")
    configs = pools.of([two, other, one])
    assert set(configs) == {one.spec.pool, other.spec.pool}
    config = configs[one.spec.pool]
    assert (config.provisioned, config.idle_timeout_s, config.promised_to) == (5, 600.0, "zeta/two")
    assert (config.spec, config.model, config.slots) == (one.spec, one.model, 16)
    assert configs[other.spec.pool].promised_to is None


def test_the_last_use_is_the_latest_that_any_report_said() -> None:
    history = PoolHistory(since=0.0)
    history = look(history, 10.0, last_used_at=9.0, idle_timeout_s=60.0)
    history = look(history, 20.0)  # the gateway is gone
    assert (history.last_used_at, history.idle_timeout_s) == (9.0, 60.0)
    history = look(history, 30.0, running=1)  # whatever its clock says, it is used now
    assert history.last_used_at == 30.0


def test_it_is_remembered_when_each_engine_was_last_needed() -> None:
    history = PoolHistory(since=0.0)
    for now, running in ((1.0, 9), (2.0, 5), (3.0, 1), (4.0, 0)):
        history = look(history, now, running=running)
    assert history.needed_at == (3.0, 2.0, 1.0)


def test_waiting_counts_from_its_beginning_and_ends_with_the_last_hold() -> None:
    history = look(PoolHistory(since=0.0), 1.0, waiting=1)
    history = look(history, 2.0, waiting=3)
    assert history.waiting_since == 1.0
    assert look(history, 3.0, running=3).waiting_since is None


def test_a_queue_is_watched_only_while_no_start_is_under_way() -> None:
    history = look(PoolHistory(since=0.0), 1.0, settled=False, waiting=9, arrivals=9)
    assert history.queue is None
    history = look(history, 2.0, running=4, waiting=5, arrivals=9)
    history = look(history, 3.0, running=4, waiting=7, arrivals=13)
    assert history.queue == QueueStart(at=2.0, arrivals=9, in_system=9)
    assert look(history, 4.0, running=4, arrivals=13).queue is None


def test_failures_in_a_row_double_the_wait_until_one_succeeds() -> None:
    history = PoolHistory(since=0.0)
    waits = []
    for _ in range(10):
        history = pools.failed(history, "no", backoff_s=2.0, backoff_max_s=300.0, now=100.0)
        assert history.failure is not None
        waits.append(history.failure.retry_at - 100.0)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0]
    assert history.failure == PoolFailure(reason="no", failures=10, retry_at=400.0)
    history = pools.succeeded(history, start_s=1.5)
    assert (history.failure, history.start_s) == (None, 1.5)


def test_a_prewarm_counts_as_use_and_ends_when_an_engine_is_ready() -> None:
    history = pools.prewarm(PoolHistory(since=0.0), idle_timeout_s=60.0, now=10.0)
    assert (history.last_used_at, history.wanted_until) == (10.0, 70.0)
    assert pools.succeeded(history, start_s=1.0).wanted_until == 0.0
    assert pools.unwanted(history).wanted_until == 0.0
