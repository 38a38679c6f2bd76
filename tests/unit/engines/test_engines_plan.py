"""What is to be done about the engines: decisions as tables, from a situation to actions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from deciding import EPOCH, GB, MEMORY, device, engine, engine_id, report, variant
from msgspec.structs import replace

from engines import demand, pools
from engines.actions import Drain, Draining, Probe, Reason, Start, Stop, Undrain
from engines.model import Demand, DeviceId, Engine, EngineId, EngineState, PoolDemand, PoolFailure, Variant
from engines.plan import Plan, PoolPlan, Situation, decide
from engines.pools import PoolConfig, PoolHistory, QueueStart

S = EngineState
A, B, C = variant("a", idle_timeout_s=60.0), variant("b", idle_timeout_s=60.0), variant("c", idle_timeout_s=60.0)
POOL_A, POOL_B, POOL_C = A.spec.pool, B.spec.pool, C.spec.pool
ONE, TWO, THREE = engine_id(1), engine_id(2), engine_id(3)
NOW = 1000.0


def configs(variants: Iterable[Variant], size: int = GB) -> dict[Any, PoolConfig]:
    """Pools whose engines take `size`, all of it overhead."""
    return {
        pool: replace(config, footprint=replace(config.footprint, weights=0, kv_cache=0, overhead=size))
        for pool, config in pools.of(variants).items()
    }


def plan(
    *engines: Engine,
    variants: Iterable[Variant] | None = (A, B, C),
    reports: Iterable[Demand] = (),
    histories: Mapping[Any, Mapping[str, Any]] | None = None,
    draining: Mapping[EngineId, Draining] | None = None,
    size: int = GB,
    **fields: Any,
) -> Plan:
    """Decide at `NOW`. Pools were last used at 990 unless `histories` says otherwise; 4 GB of memory."""
    held: demand.Reports = {}
    for one in reports:
        held = demand.receive(held, one, NOW)
    known = None if variants is None else configs(variants, size)
    told = histories or {}
    return decide(
        Situation(
            **(
                {
                    "now": NOW,
                    "since": 0.0,
                    "epoch": EPOCH,
                    "engines": {e.id: e for e in engines},
                    "devices": (device(4 * GB),),
                    "configs": known,
                    "histories": {
                        pool: PoolHistory(**({"since": 0.0, "last_used_at": 990.0} | dict(told.get(pool, {}))))
                        for pool in known or {}
                    },
                    "reports": held,
                    "draining": draining or {},
                    "max_engines_per_pool": 4,
                }
                | fields
            )
        )
    )


def start(of: Variant, *, size: int = GB, caused_by: str | None = None, on: DeviceId = MEMORY) -> Start:
    return Start(pool=of.spec.pool, device=on, memory_bytes=size, caused_by=caused_by)


def waiting(of: Variant, slots: int = 1, number: int = 1, caused_by: str = "acme/bot", **fields: Any) -> Demand:
    return report(number, pools={of.spec.pool: PoolDemand(waiting=slots, caused_by=caused_by)}, **fields)


def running(of: Variant, on: Engine, slots: int = 1, number: int = 1) -> Demand:
    return report(number, pools={of.spec.pool: PoolDemand(running=slots)}, engines={on.id: slots})


# Starting


def test_nothing_wanted_nothing_done() -> None:
    assert plan().actions == ()


@pytest.mark.parametrize("holds", [1, 16, 50])
def test_i6_simultaneous_first_requests_cause_one_start(holds: int) -> None:
    assert plan(reports=[waiting(A, holds)]).actions == (start(A, caused_by="acme/bot"),)


@pytest.mark.parametrize("state", [S.PLACED, S.STARTING, S.WAKING])
def test_i6_a_start_under_way_is_enough(state: EngineState) -> None:
    assert plan(engine(1, A, state), reports=[waiting(A, 50)]).actions == ()


def test_a_queue_that_will_outlast_a_start_gets_a_second_engine() -> None:
    slow = {"queue": QueueStart(at=NOW - 10.0, arrivals=0, in_system=50), "start_s": 2.0}
    busy = engine(1, A)
    demands = [report(pools={POOL_A: PoolDemand(running=16, waiting=34)}, engines={ONE: 16})]
    assert plan(busy, reports=demands, histories={POOL_A: slow}).actions == (start(A),)
    assert plan(busy, engine(2, A, S.STARTING), reports=demands, histories={POOL_A: slow}).actions == ()


def test_provisioned_engines_start_without_any_request() -> None:
    promised = variant("a", provisioned=17)
    assert plan(variants=[promised]).actions == (start(promised, caused_by="acme/bot"),) * 2


def test_promises_come_before_demand_and_then_the_longest_hold() -> None:
    promised = variant("c", provisioned=1)
    found = plan(
        variants=[A, B, promised],
        reports=[waiting(A), waiting(B, number=2)],
        histories={POOL_A: {"waiting_since": 950.0}, POOL_B: {"waiting_since": 940.0}},
    )
    assert [action.pool for action in found.actions if isinstance(action, Start)] == [
        promised.spec.pool,
        POOL_B,
        POOL_A,
    ]


def test_nothing_starts_before_a_failed_pool_may_try_again() -> None:
    def after(retry_at: float) -> Plan:
        failure = PoolFailure(reason="no", failures=2, retry_at=retry_at)
        return plan(reports=[waiting(A)], histories={POOL_A: {"failure": failure}})

    assert after(NOW + 0.1).actions == ()
    assert after(NOW + 0.1).pools[POOL_A] == PoolPlan(1, None)
    assert after(NOW).actions == (start(A, caused_by="acme/bot"),)


def test_nothing_is_decided_before_the_variants_are_known() -> None:
    assert plan(engine(1, A), variants=None, reports=[waiting(B)]) == Plan()


def test_engines_of_a_pool_that_no_variant_names_drain() -> None:
    assert plan(engine(1, A, ready_at=NOW), variants=[B]).actions == (Drain(ONE, Reason.UNNAMED),)


# Room


def test_i4_no_more_is_started_than_fits() -> None:
    found = plan(reports=[waiting(A), waiting(B, number=2), waiting(C, number=3)], devices=(device(2 * GB),))
    assert len(found.actions) == 2


def test_where_nothing_is_idle_the_pool_says_why_it_is_blocked() -> None:
    busy = engine(1, A)
    found = plan(busy, reports=[waiting(B), running(A, busy, number=2)], devices=(device(GB + 5 * GB // 10),))
    assert found.actions == ()
    assert found.pools[POOL_B] == PoolPlan(1, "an engine needs 1.00 GB, 0.50 GB is free and nothing idle can make room")
    assert found.pools[POOL_A].blocked is None


def test_the_engine_longest_without_use_makes_room() -> None:
    found = plan(
        engine(1, A),
        engine(2, B),
        reports=[waiting(C)],
        histories={POOL_A: {"last_used_at": 980.0}, POOL_B: {"last_used_at": 970.0}},
        devices=(device(2 * GB),),
    )
    assert found.actions == (Drain(TWO, Reason.PRESSURE),)
    assert found.pools[POOL_C].blocked == "waiting for 1.00 GB on here/mem that other engines are giving back"


@pytest.mark.parametrize("state", [S.DRAINING, S.STOPPING, S.FAILED])
def test_memory_that_is_coming_anyway_is_waited_for(state: EngineState) -> None:
    draining = {TWO: Draining(Reason.OPERATOR, 1)} if state is S.DRAINING else {}
    found = plan(
        engine(1, A),
        engine(2, B, state),
        reports=[waiting(C)],
        draining=draining,
        devices=(device(2 * GB),),
    )
    assert [action for action in found.actions if isinstance(action, (Start, Drain))] == []
    assert "giving back" in str(found.pools[POOL_C].blocked)


def test_what_one_pool_waits_for_is_not_promised_to_another() -> None:
    found = plan(
        engine(1, A),
        engine(2, A, S.STOPPING),
        reports=[waiting(B), waiting(C, number=2)],
        histories={POOL_B: {"waiting_since": 1.0}, POOL_C: {"waiting_since": 2.0}},
        devices=(device(2 * GB),),
    )
    assert found.actions == (Drain(ONE, Reason.PRESSURE),)  # for C; what stops is B's


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param({"variants": [variant("a", provisioned=1), B]}, id="promised"),
        pytest.param({"reports": [waiting(B), running(A, engine(1, A), number=2)]}, id="in flight"),
        pytest.param({"reports": [waiting(B), waiting(A, number=2)]}, id="has holds"),
        pytest.param({"since": NOW - 4.9}, id="gateways not heard yet"),
    ],
)
def test_i3_these_never_make_room(kept: dict[str, Any]) -> None:
    found = plan(engine(1, A), **({"reports": [waiting(B)], "devices": (device(GB),)} | kept))
    assert found.actions == ()


def test_of_two_engines_the_one_that_is_not_needed_makes_room() -> None:
    first, second = engine(1, A), engine(2, A)
    found = plan(first, second, reports=[waiting(B), running(A, first, number=2)], devices=(device(2 * GB),))
    assert found.actions == (Drain(TWO, Reason.PRESSURE),)


def test_i3_a_promise_that_is_not_yet_kept_in_full_is_not_broken_further() -> None:
    promised = variant("a", provisioned=33)
    found = plan(
        engine(1, promised),
        engine(2, promised),
        variants=[promised, B],
        reports=[waiting(B)],
        devices=(device(2 * GB),),
    )
    assert found.actions == ()


def test_nobody_leaves_for_what_would_not_fit_anyway() -> None:
    found = plan(engine(1, A), reports=[waiting(B)], size=2 * GB, devices=(device(GB),))
    assert found.actions == ()


# Draining


def drain(engine_: Engine, of: Reason = Reason.IDLE, *, empty: bool = False, **given: Any) -> Plan:
    return plan(engine_, draining={engine_.id: Draining(of, 7, empty)}, **given)


DRAINS = engine(1, A, S.DRAINING)


@pytest.mark.parametrize(
    ("reports", "asked"),
    [
        ([], True),
        ([report(version=7)], True),
        ([report(version=6)], False),  # has not seen it drain
        ([report(1, version=9), report(2, version=6)], False),
        ([report(epoch=EPOCH - 1, version=99)], False),
        ([report(epoch=EPOCH + 1, version=0)], True),
        ([report(version=7, engines={ONE: 1})], False),  # has something in flight
        ([report(version=7, engines={TWO: 1})], True),
    ],
)
def test_i3_a_drained_engine_stops_only_after_every_gateway_let_go(reports: list[Demand], asked: bool) -> None:
    assert drain(DRAINS, reports=reports).actions == ((Probe(ONE),) if asked else ())
    assert drain(DRAINS, reports=reports, empty=True).actions == ((Stop(ONE, Reason.IDLE),) if asked else ())


def test_i3_nothing_stops_until_a_new_controller_has_heard_the_gateways() -> None:
    assert drain(DRAINS, since=NOW - 4.9).actions == ()
    assert drain(DRAINS, since=NOW - 5.0).actions == (Probe(ONE),)


@pytest.mark.parametrize(
    ("reason", "taken_back"),
    [(reason, reason in {Reason.IDLE, Reason.PRESSURE}) for reason in Reason if reason is not Reason.SHUTDOWN],
)
def test_returning_demand_takes_an_idle_engine_back(reason: Reason, taken_back: bool) -> None:
    found = drain(DRAINS, reason, reports=[waiting(A, version=6)])
    assert found.actions == ((Undrain(ONE),) if taken_back else (start(A, caused_by="acme/bot"),))


def test_an_engine_that_is_about_to_stop_is_not_taken_back() -> None:
    found = drain(DRAINS, reports=[waiting(A, version=7)], empty=True)
    assert found.actions == (Stop(ONE, Reason.IDLE), start(A, caused_by="acme/bot"))


def test_an_engine_taken_back_makes_no_room_for_others() -> None:
    found = drain(DRAINS, reports=[waiting(A), waiting(B, number=2)], devices=(device(GB),))
    assert found.actions == (Undrain(ONE),)
    assert "nothing idle" in str(found.pools[POOL_B].blocked)


def test_what_it_finishes_does_not_take_an_engine_back() -> None:
    assert drain(DRAINS, reports=[running(A, DRAINS)]).actions == ()


# Leaving


def test_an_engine_drains_when_its_keep_alive_is_over() -> None:
    def after(last_used_at: float) -> Plan:
        return plan(engine(1, A), histories={POOL_A: {"last_used_at": last_used_at}})

    assert after(940.1).actions == ()
    assert after(940.1).pools[POOL_A] == PoolPlan(1)
    assert after(940.0).actions == (Drain(ONE, Reason.IDLE),)
    assert after(940.0).pools[POOL_A] == PoolPlan(0)


def test_nothing_is_idle_until_a_new_controller_has_heard_the_gateways() -> None:
    assert plan(engine(1, A), histories={POOL_A: {"last_used_at": 0.0}}, since=NOW - 4.9).actions == ()


def test_promised_engines_have_no_keep_alive() -> None:
    promised = variant("a", provisioned=1, idle_timeout_s=60.0)
    found = plan(
        engine(1, promised), engine(2, promised), variants=[promised], histories={POOL_A: {"last_used_at": 0.0}}
    )
    assert found.actions == (Drain(ONE, Reason.IDLE),)  # one of the two


def test_a_pool_shrinks_one_by_one_and_the_emptiest_goes_first() -> None:
    first, second, third = engine(1, A), engine(2, A), engine(3, A)
    found = plan(
        first,
        second,
        third,
        reports=[report(pools={POOL_A: PoolDemand(running=3)}, engines={ONE: 2, THREE: 1})],
        histories={POOL_A: {"last_used_at": NOW, "needed_at": (NOW, 10.0, 10.0)}},
    )
    assert found.actions == (Drain(TWO, Reason.IDLE),)
    assert found.pools[POOL_A] == PoolPlan(2)


# Closing


def test_a_closing_installation_starts_nothing_and_lets_everything_go() -> None:
    promised = variant("b", provisioned=1)
    found = plan(
        engine(1, A),
        engine(2, A, S.STARTING),
        engine(3, A, S.PLACED),
        variants=[A, promised],
        reports=[waiting(A)],
        closing=True,
    )
    assert found.actions == (Drain(ONE, Reason.SHUTDOWN), Stop(TWO, Reason.SHUTDOWN))
    assert drain(DRAINS, Reason.SHUTDOWN, empty=True, closing=True, since=NOW).actions == (Stop(ONE, Reason.SHUTDOWN),)
