"""Where engines fit and who makes room."""

from __future__ import annotations

import pytest
from deciding import GB, MEMORY, device, engine, engine_id, model, variant

from engines import footprint, placement
from engines.errors import DoesNotFit
from engines.model import DeviceId, EngineState, Footprint, RuntimeArguments
from engines.placement import Candidate, Eviction

BOT = variant("a")
LEFT, RIGHT = DeviceId("here/gpu0"), DeviceId("here/gpu1")


def candidate(number: int, size: int, last_used_at: float, on: DeviceId = LEFT) -> Candidate:
    return Candidate(engine_id(number), on, size * GB, last_used_at)


@pytest.mark.parametrize(
    ("state", "free"),
    [(state, 4 * GB if state in {EngineState.ASLEEP, EngineState.STOPPED} else 3 * GB) for state in EngineState],
)
def test_i4_memory_is_reserved_in_every_state_but_asleep_and_stopped(state: EngineState, free: int) -> None:
    assert placement.free([device(4 * GB)], [engine(1, BOT, state)]) == {MEMORY: free}


def test_engines_on_their_way_out_will_give_back_what_they_hold() -> None:
    engines = [engine(n, BOT, state) for n, state in enumerate(EngineState)]
    assert placement.coming(engines) == {MEMORY: 3 * GB}


def test_an_engine_goes_where_least_is_left_over() -> None:
    left = {LEFT: 8 * GB, RIGHT: 5 * GB}
    assert placement.fit(4 * GB, left) == RIGHT
    assert placement.fit(6 * GB, left) == LEFT
    assert placement.fit(9 * GB, left) is None
    assert placement.fit(1, {}) is None


def test_those_longest_without_use_leave_first() -> None:
    candidates = [candidate(1, 1, 30.0), candidate(2, 1, 10.0), candidate(3, 1, 20.0)]
    assert placement.evict(3 * GB, {LEFT: GB}, candidates) == Eviction(LEFT, (engine_id(2), engine_id(3)), 2 * GB)


def test_nobody_leaves_who_turns_out_not_to_be_needed() -> None:
    candidates = [candidate(1, 1, 10.0), candidate(2, 4, 20.0)]
    assert placement.evict(4 * GB, {LEFT: 0}, candidates) == Eviction(LEFT, (engine_id(2),), 4 * GB)


def test_nobody_leaves_if_it_would_not_be_enough() -> None:
    assert placement.evict(4 * GB, {LEFT: GB}, [candidate(1, 1, 10.0), candidate(2, 1, 20.0)]) is None
    assert placement.evict(4 * GB, {LEFT: GB}, []) is None


def test_victims_on_two_devices_are_not_added_up() -> None:
    candidates = [candidate(1, 2, 10.0, LEFT), candidate(2, 2, 20.0, RIGHT)]
    assert placement.evict(3 * GB, {LEFT: 0, RIGHT: 0}, candidates) is None


def test_the_device_with_fewest_to_leave_is_chosen() -> None:
    candidates = [candidate(1, 1, 1.0), candidate(2, 1, 2.0), candidate(3, 2, 99.0, RIGHT)]
    assert placement.evict(2 * GB, {LEFT: 0, RIGHT: 0}, candidates) == Eviction(RIGHT, (engine_id(3),), 2 * GB)


def test_what_fits_no_device_is_refused_with_the_arithmetic() -> None:
    need = Footprint(weights=3 * GB, kv_cache=2 * GB, overhead=GB)
    placement.check_fits(need, [device(GB, LEFT), device(6 * GB, RIGHT)])
    with pytest.raises(DoesNotFit) as refused:
        placement.check_fits(need, [device(GB, LEFT), device(5 * GB, RIGHT)])
    assert str(refused.value) == (
        "an engine needs 6.00 GB (weights 3.00 GB + KV cache 2.00 GB + overhead 1.00 GB); the largest device, "
        "here/gpu1, has 5.00 GB for engines; lower kv_cache_bytes or give it more memory"
    )
    with pytest.raises(DoesNotFit, match="no device is known"):
        placement.check_fits(need, [])


def test_a_footprint_is_weights_cache_and_overhead() -> None:
    found = footprint.estimate(model(), RuntimeArguments(kv_cache_bytes=1 << 30))
    assert found == Footprint(weights=270_000_000, kv_cache=1 << 30, overhead=750 << 20)


def test_weights_that_are_widened_on_loading_count_at_their_new_size() -> None:
    assert footprint.estimate(model(), RuntimeArguments(dtype="float32")).weights == 540_000_000
    assert footprint.estimate(model(), RuntimeArguments(dtype="float16")).weights == 270_000_000
