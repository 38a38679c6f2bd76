"""Who goes next and where to, as timelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    ModelDigest,
    NodeId,
    RuntimeArguments,
)
from engines.routing import Candidate, NoRoute, Refused, Route, candidates, pick
from engines.waiting import Dispatch, Hold, Queue

SPEC = EngineSpec(model_digest=ModelDigest("d" * 64), arguments=RuntimeArguments(max_num_seqs=4))


def engine(name: str, state: EngineState = EngineState.READY, address: str | None = "/s") -> Engine:
    return Engine(
        id=EngineId(name),
        pool=SPEC.pool,
        spec=SPEC,
        state=state,
        since=0.0,
        node=NodeId("n"),
        device=DeviceId("n/mem"),
        memory_bytes=1,
        epoch=1,
        created_at=0.0,
        address=address,
    )


def hold(number: int, *, slots: int = 1, variant: str = "acme/bot", cap: int | None = None) -> Hold:
    return Hold(id=number, variant=variant, slots=slots, cap=cap)


def queue(*holds: Hold) -> Queue:
    waiting = Queue(100)
    for each in holds:
        assert waiting.enter(each)
    return waiting


A, B = EngineId("a"), EngineId("b")


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_only_ready_engines_are_candidates(state: EngineState) -> None:
    assert candidates([engine("a", state)], SPEC.pool, {}) == ()


def test_engines_of_other_pools_suspects_and_those_without_an_address_are_no_candidates() -> None:
    fleet = [engine("a"), engine("b"), engine("c", address=None)]
    assert candidates(fleet, SPEC.pool, {A: 3}, {B}) == (Candidate(A, 4, 3),)
    other = EngineSpec(model_digest=ModelDigest("e" * 64)).pool
    assert candidates(fleet, other, {}) == ()


def test_the_least_loaded_engine_is_picked_and_the_oldest_of_equals() -> None:
    assert pick([Candidate(A, 4, 2), Candidate(B, 4, 1)], 1) == Route(B)
    assert pick([Candidate(B, 4, 1), Candidate(A, 4, 1)], 1) == Route(A)


def test_no_route_says_whether_an_engine_or_a_slot_is_missing() -> None:
    assert pick([], 1) == NoRoute(Refused.NO_ENGINE)
    assert pick([Candidate(A, 4, 3)], 2) == NoRoute(Refused.NO_SLOT)


def test_holds_go_in_order_of_arrival_to_as_many_slots_as_there_are() -> None:
    waiting = queue(hold(1), hold(2), hold(3))
    assert waiting.next([Candidate(A, 4, 3), Candidate(B, 4, 3)], {}) == (
        Dispatch(hold(1), A),
        Dispatch(hold(2), B),
    )


def test_nobody_overtakes_a_wide_request_that_waits_for_slots() -> None:
    waiting = queue(hold(1, slots=3), hold(2))
    assert waiting.next([Candidate(A, 4, 2)], {}) == ()
    assert [d.hold.id for d in waiting.next([Candidate(A, 4, 0)], {})] == [1, 2]


def test_a_variant_at_its_cap_is_passed_over() -> None:
    capped = [hold(n, variant="acme/small", cap=2) for n in (1, 2)]
    waiting = queue(*capped, hold(3))
    dispatched = waiting.next([Candidate(A, 4, 0)], {"acme/small": 1})
    assert [d.hold.id for d in dispatched] == [1, 3]


def test_a_full_queue_takes_nobody_until_someone_leaves() -> None:
    waiting = Queue(1)
    assert waiting.enter(hold(1))
    assert not waiting.enter(hold(2))
    assert waiting.leave(1)
    assert not waiting.leave(1)
    assert waiting.enter(hold(2))


def test_the_slots_wanted_and_the_oldest_are_known() -> None:
    waiting = queue(hold(1, slots=2), hold(2, slots=3))
    assert (waiting.slots, waiting.oldest) == (5, hold(1, slots=2))
    assert Queue(1).oldest is None


@given(
    holds=st.lists(st.tuples(st.integers(1, 4), st.sampled_from("xy"), st.none() | st.integers(1, 3)), max_size=12),
    used=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    running=st.dictionaries(st.sampled_from("xy"), st.integers(0, 3)),
)
def test_no_engine_is_given_more_than_its_free_slots_and_no_variant_more_than_its_cap(
    holds: list[tuple[int, str, int | None]], used: list[int], running: dict[str, int]
) -> None:
    waiting = queue(*(hold(n, slots=slots, variant=v, cap=cap) for n, (slots, v, cap) in enumerate(holds)))
    engines = [Candidate(EngineId(str(n)), 4, u) for n, u in enumerate(used)]
    dispatched = waiting.next(engines, running)
    assert [d.hold.id for d in dispatched] == sorted(d.hold.id for d in dispatched)
    for candidate in engines:
        assert sum(d.hold.slots for d in dispatched if d.engine == candidate.engine) <= max(0, candidate.free)
    for d in dispatched:
        before = sum(1 for e in dispatched if e.hold.variant == d.hold.variant and e.hold.id < d.hold.id)
        assert d.hold.cap is None or running.get(d.hold.variant, 0) + before < d.hold.cap
