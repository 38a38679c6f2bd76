"""Whatever happens in whatever order: engines' lives are whole, memory is promised once, and all comes to rest."""

from __future__ import annotations

from collections.abc import Callable

from deciding import variant
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World

from engines.launchers.memory import Behaviour, seeded, steady
from engines.model import Engine, EngineState, Variant

S = EngineState
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)
POOLS = (
    variant("a", slots=4, idle_timeout_s=20.0),
    variant("b", slots=2, idle_timeout_s=5.0, provisioned=3),
    variant("c", slots=8, idle_timeout_s=0.0),
    variant("d", slots=1, idle_timeout_s=60.0),
)
ENGINE = 1_324_869_632
"""What an engine of these pools reserves."""


class Script:
    """A seeded script until it is told to behave."""

    def __init__(self, seed: int) -> None:
        self.play: Callable[[Engine], Behaviour] = seeded(seed, refuse=0.05, fail=0.2, die=0.3, lives_s=(0.0, 60.0))

    def __call__(self, engine: Engine) -> Behaviour:
        return self.play(engine)


def mischief(world: World, seconds: float, rate: float) -> None:
    """Requests and accidents at random times until `seconds` from now."""
    end = world.now + seconds
    accidents = (
        world.kill_engine,
        world.kill_gateway,
        world.lead,
        lambda: world.order_stop(force=False),
        lambda: world.order_stop(force=True),
    )

    def request() -> None:
        if world.now < end:
            for _ in range(world.random.choice((1, 1, 1, 2, 12))):
                world.arrive(world.random.choice(world.variants), world.random.expovariate(1 / 3.0))
            world.at(world.random.expovariate(rate), request)

    def accident() -> None:
        if world.now < end:
            world.random.choice(accidents)()
            world.at(world.random.expovariate(1 / 7.0), accident)

    world.at(0.0, request)
    world.at(0.0, accident)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, places=st.integers(2, 6), rate=st.sampled_from((0.1, 0.5, 2.0)))
def test_i3_i4_i5_i10_any_sequence_of_events_keeps_the_rules_and_comes_to_rest(
    seed: int, places: int, rate: float
) -> None:
    script = Script(seed)
    world = World(seed, POOLS, places * ENGINE, script)
    world.reporting()
    mischief(world, 90.0, rate)
    world.run(90.0)
    script.play = steady(1.0)
    world.run(200.0)
    world.check_over()
    assert [(e.pool, e.state) for e in world.stored.values()] == [(POOLS[1].spec.pool, S.READY)] * 2
    fleet = world.roster._published
    assert [pool.blocked for pool in fleet.pools] == [None] * 4


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, requests=st.integers(1, 400), slots=st.integers(1, 32), lasts_s=st.sampled_from((0.01, 1.0, 60.0)))
def test_i6_n_first_requests_cause_no_more_starts_than_their_slots_need(
    seed: int, requests: int, slots: int, lasts_s: float
) -> None:
    bot = variant("a", slots=slots, idle_timeout_s=60.0)
    world = World(seed, [bot], 8 * ENGINE, steady(2.0))
    world.reporting()
    for _ in range(requests):
        world.arrive(bot, lasts_s)
    world.run(80.0)
    waves = -(-requests // slots)
    assert world.starts() <= min(waves, 4)
    if waves * lasts_s < 3.0:  # the queue drains before a second start could matter
        assert world.starts() == 1
        assert {request.outcome for request in world.requests} == {"completed"}


def test_i6_fifty_first_requests_on_sixteen_slots_cause_one_start() -> None:
    bot = variant("a", slots=16)
    world = World(1, [bot], 8 * ENGINE, steady(2.0))
    world.reporting()
    for _ in range(50):
        world.arrive(bot, 1.0)
    world.run(20.0)
    assert world.starts() == 1
    assert {request.outcome for request in world.requests} == {"completed"}


def test_two_pools_that_share_one_place_both_get_served() -> None:
    one, two = variant("a", idle_timeout_s=600.0), variant("b", idle_timeout_s=600.0)
    world = World(1, [one, two], ENGINE, steady(1.0, stop_s=0.2))
    world.reporting()
    for turn in range(10):
        bot: Variant = (one, two)[turn % 2]
        world.at(turn * 20.0, lambda bot=bot: world.arrive(bot, 1.0) and None)  # type: ignore[misc]
    world.run(220.0)
    assert [request.outcome for request in world.requests] == ["completed"] * 10
    assert world.starts() == 10


def test_a_burst_that_lasts_brings_engine_after_engine_and_they_leave_after_it() -> None:
    bot = variant("a", slots=4, idle_timeout_s=30.0)
    world = World(1, [bot], 8 * ENGINE, steady(2.0))
    world.reporting()
    for n in range(400):
        world.at(n * 0.25, lambda: world.arrive(bot, 3.0) and None)  # 12 at once on average
    world.run(100.0)
    ready = [e for e in world.stored.values() if e.state is S.READY]
    assert 3 <= len(ready) <= 4
    world.run(200.0)
    assert world.stored == {}
    world.check_over()
