"""How engines and pools change: timelines of what happens and what the roster makes of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from deciding import EPOCH, GB, MEMORY, device, engine, engine_id, report, variant
from msgspec import Struct

from engines.actions import Draining, Reason
from engines.launchers.launcher import Exited, Ready, Started
from engines.model import Engine, EngineState, PoolDemand, PoolFailure, Variant
from engines.roster import Change, Roster

S = EngineState
A = variant("a", idle_timeout_s=60.0)
POOL = A.spec.pool
ONE = engine_id(1)


class Policy(Struct, frozen=True):
    max_engines_per_pool: int = 4
    backoff_s: float = 2.0
    backoff_max_s: float = 300.0


def roster(*variants: Variant, memory: int = 8 * GB, since: float = 0.0, **fields: Any) -> Roster:
    ids = map(engine_id, itertools.count(1))
    made = Roster(
        epoch=EPOCH,
        since=since,
        policy=Policy(),
        devices=(device(memory),),
        new_id=lambda: next(ids),
        **fields,
    )
    made.catalog_changed(variants or (A,))
    return made


def wait_for(made: Roster, now: float, slots: int = 1) -> None:
    demand = PoolDemand(waiting=slots, last_used_at=now, idle_timeout_s=60.0, caused_by="acme/bot")
    made.demand_received(report(at=now, version=10**6, pools={POOL: demand}), now)


def nobody_waits(made: Roster, now: float, used_at: float) -> None:
    demand = PoolDemand(last_used_at=used_at, idle_timeout_s=60.0)
    made.demand_received(report(at=now, version=10**6, pools={POOL: demand}), now)


def process(number: int = 1) -> Started:
    return Started(address=f"/run/{number}/s", pid=100 + number, pid_start=number)


def steps(*changes: Change) -> list[tuple[EngineState | None, EngineState]]:
    return [(change.before, change.after.state) for change in changes]


def ready_at_12(made: Roster) -> Engine:
    wait_for(made, 10.0)
    made.decide(10.0)
    made.started(ONE, process(), 10.5)
    (change,) = made.event(Ready(engine=ONE, phases_us={"fork": 9}), 12.0)
    return change.after


def test_a_hold_becomes_an_engine_and_an_idle_engine_becomes_nothing() -> None:
    made = roster()
    wait_for(made, 10.0)
    (placed,) = made.decide(10.0).changes
    assert placed.before is None
    assert (placed.after.state, placed.after.device, placed.after.caused_by) == (S.PLACED, MEMORY, "acme/bot")
    assert placed.after.memory_bytes == made.config(POOL).footprint.total  # type: ignore[union-attr]
    assert made.decide(10.1).changes == ()
    (starting,) = made.started(ONE, process(), 10.5)
    assert (starting.after.address, starting.after.pid, starting.after.pid_start) == ("/run/1/s", 101, 1)
    (ready,) = made.event(Ready(engine=ONE, phases_us={"fork": 9}), 12.0)
    assert (ready.after.ready_at, ready.after.phases_us) == (12.0, {"fork": 9})
    assert made.history(POOL).start_s == 2.0

    nobody_waits(made, 13.0, used_at=12.5)
    made.decide(13.0)
    assert made.decide(72.4).changes == ()
    (draining,) = made.decide(72.5).changes
    assert (draining.after.state, draining.reason) == (S.DRAINING, Reason.IDLE)
    ((asked, how),) = made.decide(72.6).probes
    made.probed(asked.id, how, 0)
    (stopping,) = made.decide(72.7).changes
    assert steps(stopping) == [(S.DRAINING, S.STOPPING)]
    (stopped,) = made.stopped(ONE, 73.0)
    assert steps(stopped) == [(S.STOPPING, S.STOPPED)]
    assert made.engines == {}
    assert made.decide(74.0).changes == ()


def test_a_failed_start_is_told_waited_for_and_forgotten_after_success() -> None:
    made = roster()
    wait_for(made, 10.0)
    made.decide(10.0)
    made.started(ONE, process(), 10.1)
    lines = ("Traceback", "MemoryError")
    (failed,) = made.event(Exited(engine=ONE, reason="exit status 1", last_lines=lines), 11.0)
    assert (failed.after.state, failed.after.failure, failed.last_lines) == (S.FAILED, "exit status 1", lines)
    failure = PoolFailure(reason="the engine ran out of memory while loading the model", failures=1, retry_at=13.0)
    fleet = made.fleet(11.0)
    assert fleet is not None
    assert fleet.pools[0].failure == failure
    made.stopped(ONE, 11.5)
    wait_for(made, 12.0)
    assert made.decide(12.9).changes == ()
    wait_for(made, 13.0)
    (again,) = made.decide(13.0).changes
    made.started(again.after.id, process(2), 13.1)
    made.event(Ready(engine=again.after.id, phases_us={}), 14.0)
    assert made.history(POOL).failure is None


def test_a_start_that_gets_no_process_ends_at_once_with_its_reason() -> None:
    made = roster()
    wait_for(made, 10.0)
    made.decide(10.0)
    (over,) = made.start_failed(ONE, "the engine host is away", 10.2, last_lines=("no",))
    assert steps(over) == [(S.PLACED, S.STOPPED)]
    assert (over.after.failure, over.last_lines) == ("the engine host is away", ("no",))
    assert made.history(POOL).failure == PoolFailure(
        reason="the engine host could not start an engine", failures=1, retry_at=12.2
    )


def test_i4_the_memory_of_a_failed_engine_is_given_out_only_after_it_is_gone() -> None:
    made = roster(memory=2 * GB)
    ready_at_12(made)
    made.event(Exited(engine=ONE, reason="killed by SIGKILL"), 20.0)
    wait_for(made, 20.0)
    assert made.decide(20.0).changes == ()
    made.stopped(ONE, 21.0)
    assert steps(*made.decide(21.0).changes) == [(None, S.PLACED)]


def test_an_engine_that_dies_while_ready_does_not_hold_its_pool_back() -> None:
    made = roster()
    ready_at_12(made)
    made.event(Exited(engine=ONE, reason="killed by SIGKILL"), 20.0)
    wait_for(made, 20.0)
    assert steps(*made.decide(20.0).changes) == [(None, S.PLACED)]


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        (Ready(engine=ONE, phases_us={}), S.READY),
        (Exited(engine=ONE, reason="exit status 1"), S.FAILED),
    ],
)
def test_what_is_seen_before_the_start_is_reported_counts_after_it(event: Ready | Exited, ends: EngineState) -> None:
    made = roster()
    wait_for(made, 10.0)
    made.decide(10.0)
    assert made.event(event, 10.1) == ()
    assert steps(*made.started(ONE, process(), 10.2)) == [(S.PLACED, S.STARTING), (S.STARTING, ends)]


def test_events_of_engines_on_their_way_out_or_unknown_change_nothing() -> None:
    made = roster()
    ready_at_12(made)
    made.stop(ONE, 13.0, force=True)
    assert made.event(Exited(engine=ONE, reason="exit status 0"), 14.0) == ()
    assert made.event(Ready(engine=ONE, phases_us={}), 14.0) == ()
    assert made.event(Ready(engine=engine_id(99), phases_us={}), 14.0) == ()
    assert made.stopped(engine_id(99), 14.0) == ()


def test_i3_a_probe_counts_only_for_the_drain_that_it_was_made_for() -> None:
    made = roster()
    ready_at_12(made)
    nobody_waits(made, 13.0, used_at=12.5)
    made.decide(100.0)
    nobody_waits(made, 100.0, used_at=12.5)
    ((_, before),) = made.decide(100.1).probes
    wait_for(made, 101.0)
    assert steps(*made.decide(101.0).changes) == [(S.DRAINING, S.READY)]
    assert made.fleet(101.0) is not None
    nobody_waits(made, 102.0, used_at=101.0)
    made.decide(200.0)
    made.probed(ONE, before, 0)
    assert not made.draining[ONE].empty


def test_i3_an_engine_that_has_something_in_flight_is_asked_again() -> None:
    made = roster()
    ready_at_12(made)
    made.stop(ONE, 13.0)
    ((_, how),) = made.decide(30.0).probes
    made.probed(ONE, how, 2)
    assert made.decide(30.1).changes == ()
    ((_, how),) = made.decide(30.2).probes
    made.probed(ONE, how, None)
    assert steps(*made.decide(30.3).changes) == [(S.DRAINING, S.STOPPING)]


# Orders


@pytest.mark.parametrize(
    ("state", "polite", "forced"),
    [
        (S.STARTING, [S.STOPPING], [S.STOPPING]),
        (S.READY, [S.DRAINING], [S.DRAINING, S.STOPPING]),
        (S.DRAINING, [], [S.STOPPING]),
        (S.STOPPING, [], []),
        (S.FAILED, [], []),
        (S.ASLEEP, [S.STOPPING], [S.STOPPING]),
        (S.WAKING, [S.STOPPING], [S.STOPPING]),
    ],
)
def test_an_operator_stops_an_engine_in_any_state(
    state: EngineState, polite: list[EngineState], forced: list[EngineState]
) -> None:
    for force, expected in ((False, polite), (True, forced)):
        made = roster()
        made.adopt([engine(1, A, state)], {ONE}, 5.0)
        assert [change.after.state for change in made.stop(ONE, 6.0, force=force)] == expected


def test_a_drain_that_an_operator_ordered_is_not_taken_back() -> None:
    made = roster()
    ready_at_12(made)
    nobody_waits(made, 13.0, used_at=12.5)
    made.decide(100.0)
    made.stop(ONE, 100.5)
    wait_for(made, 101.0)
    assert steps(*made.decide(101.0).changes) == [(None, S.PLACED)]


def test_an_engine_that_is_stopped_before_its_process_exists_ends_when_it_does() -> None:
    made = roster()
    wait_for(made, 10.0)
    made.decide(10.0)
    assert made.stop(ONE, 10.1) == ()
    assert steps(*made.started(ONE, process(), 10.2)) == [(S.PLACED, S.STARTING), (S.STARTING, S.STOPPING)]


def test_a_prewarm_starts_an_engine_and_counts_as_use() -> None:
    made = roster()
    assert not made.prewarm(variant("z").spec.pool, 10.0)
    assert made.prewarm(POOL, 10.0)
    assert steps(*made.decide(10.0).changes) == [(None, S.PLACED)]
    made.started(ONE, process(), 10.1)
    made.event(Ready(engine=ONE, phases_us={}), 12.0)
    assert made.decide(71.9).changes == ()
    assert steps(*made.decide(72.0).changes) == [(S.READY, S.DRAINING)]


def test_closing_lets_everything_go_and_the_deadline_waits_for_nobody() -> None:
    made = roster(since=0.0)
    ready_at_12(made)
    busy = PoolDemand(running=1, last_used_at=13.0, idle_timeout_s=60.0)
    made.demand_received(report(at=13.0, version=10**6, pools={POOL: busy}, engines={ONE: 1}), 13.0)
    made.close()
    assert steps(*made.decide(13.0).changes) == [(S.READY, S.DRAINING)]
    assert made.decide(14.0).probes == ()
    assert steps(*made.stop_all(15.0)) == [(S.DRAINING, S.STOPPING)]
    made.stopped(ONE, 16.0)
    wait_for(made, 16.0)
    assert made.decide(16.0).changes == ()


# Adoption


def test_a_new_controller_takes_over_what_lives_and_ends_what_does_not() -> None:
    left = [
        engine(1, A, S.PLACED, pid=None, pid_start=None, ready_at=None),
        engine(2, A, S.STARTING, ready_at=None),
        engine(3, A, S.STARTING, ready_at=None),
        engine(4, A, S.READY),
        engine(5, A, S.READY),
        engine(6, A, S.DRAINING),
        engine(7, A, S.STOPPING),
        engine(8, A, S.FAILED),
    ]
    made = roster(since=100.0)
    alive = {engine_id(n) for n in (2, 4, 6)}
    changes = made.adopt(left, alive, 100.0, last_lines=lambda e: (f"log of {e[-1]}",))
    assert {change.after.id: (change.before, change.after.state) for change in changes} == {
        engine_id(1): (S.PLACED, S.STOPPED),
        engine_id(3): (S.STARTING, S.FAILED),
        engine_id(5): (S.READY, S.FAILED),
    }
    assert [change.last_lines for change in changes[1:]] == [("log of 3",), ("log of 5",)]
    assert made.draining == {engine_id(6): Draining(Reason.ADOPTED, 1)}
    assert {e.id: e.state for e in made.engines.values()} == {
        engine_id(2): S.STARTING,
        engine_id(3): S.FAILED,
        engine_id(4): S.READY,
        engine_id(5): S.FAILED,
        engine_id(6): S.DRAINING,
        engine_id(7): S.STOPPING,
        engine_id(8): S.FAILED,
    }
    assert steps(*made.event(Ready(engine=engine_id(2), phases_us={}), 101.0)) == [(S.STARTING, S.READY)]


def test_start_times_of_earlier_controllers_are_remembered() -> None:
    made = roster(start_times={POOL: 1.75})
    fleet = made.fleet(0.0)
    assert fleet is not None
    assert fleet.pools[0].start_s == 1.75


# The fleet


def test_a_fleet_is_published_when_it_says_something_new() -> None:
    made = roster()
    first = made.fleet(1.0)
    assert first is not None
    assert (first.epoch, first.version, first.engines, first.devices) == (EPOCH, 1, (), (device(8 * GB),))
    made.decide(2.0)
    assert made.fleet(2.0) is None
    wait_for(made, 3.0)
    made.decide(3.0)
    second = made.fleet(3.0)
    assert second is not None
    assert (second.version, [e.state for e in second.engines]) == (2, [S.PLACED])
    assert second.pools[0].desired == 1
    assert made.fleet(3.1) is None


def test_the_version_that_gateways_must_acknowledge_is_the_first_that_shows_the_drain() -> None:
    made = roster()
    ready_at_12(made)
    made.fleet(12.0)
    made.stop(ONE, 13.0)
    fleet = made.fleet(13.0)
    assert fleet is not None
    assert made.draining[ONE].version == fleet.version
    assert [e.state for e in fleet.engines] == [S.DRAINING]


def test_time_in_the_database_never_goes_back() -> None:
    made = roster()
    made.adopt([engine(1, A, S.STOPPING, since=500.0)], {ONE}, 100.0)
    (stopped,) = made.stopped(ONE, 100.0)
    assert stopped.after.since == 500.0
