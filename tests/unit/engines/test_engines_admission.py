"""Admission on a real event loop with fleets made by hand; only deadlines wait for a clock."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from engines.admission import Admission, Grant, Waited
from engines.errors import AdmissionClosed, HoldExpired, LoadFailed, NotAdmitted, QueueFull
from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineState,
    Fleet,
    GatewayId,
    Model,
    ModelDigest,
    NodeId,
    PoolDemand,
    PoolFailure,
    PoolStatus,
    RuntimeArguments,
    Scaling,
    Variant,
)

NOW = 1_790_000_000.0
MODEL = Model(
    name="tiny",
    digest=ModelDigest("d" * 64),
    architecture="X",
    weights_bytes=1,
    parameters=1,
    max_model_len=64,
    kv_bytes_per_token=1,
    dtype="bfloat16",
    source="test",
)


class Gateway:
    """An admission, its clock, and a count of pokes."""

    def __init__(self, queue_length: int = 100) -> None:
        self.now = NOW
        self.pokes = 0
        self.version = 0
        self.sick: set[str] = set()
        self.waited = Waited()
        self.admission = Admission(
            GatewayId("g"),
            queue_length=queue_length,
            poke=self._poked,
            healthy=self._healthy,
            clock=lambda: self.now,
        )

    def _poked(self) -> None:
        self.pokes += 1

    async def _healthy(self, engine: Engine) -> bool:
        return engine.id not in self.sick

    async def admit(self, variant: Variant, *, slots: int = 1, wait_s: float = 60.0) -> Grant:
        self.waited = Waited()
        return await self.admission.admit(variant, slots=slots, wait_s=wait_s, waited=self.waited)

    def fleet(self, *engines: Engine, status: PoolStatus | None = None) -> None:
        self.version += 1
        pools = () if status is None else (status,)
        self.admission.fleet_changed(Fleet(epoch=1, version=self.version, at=self.now, engines=engines, pools=pools))

    def ask(self, variant: Variant, slots: int = 1, wait_s: float = 60.0) -> asyncio.Task[Grant]:
        return asyncio.create_task(self.admit(variant, slots=slots, wait_s=wait_s))


def variant(name: str = "bot", *, seqs: int = 2, cap: int | None = None, idle_s: float = 600.0) -> Variant:
    return Variant(
        workspace="acme",
        name=name,
        model=MODEL,
        arguments=RuntimeArguments(max_num_seqs=seqs),
        scaling=Scaling(max_concurrency=cap, idle_timeout_s=idle_s),
    )


BOT = variant()


def engine(name: str = "e1", state: EngineState = EngineState.READY, of: Variant = BOT) -> Engine:
    return Engine(
        id=EngineId(name),
        pool=of.spec.pool,
        spec=of.spec,
        state=state,
        since=NOW,
        node=NodeId("n"),
        device=DeviceId("n/mem"),
        memory_bytes=1,
        epoch=1,
        created_at=NOW,
        address="/s",
    )


def status(*, failure: PoolFailure | None = None, blocked: str | None = None, start_s: float = 4.0) -> PoolStatus:
    return PoolStatus(pool=BOT.spec.pool, desired=1, start_s=start_s, failure=failure, blocked=blocked)


FAILURE = PoolFailure(reason="the weights do not load", failures=2, retry_at=NOW + 100)


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_ready_engine_takes_a_request_at_once_and_warm() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    grant = await gateway.admit(BOT, slots=1, wait_s=1)
    assert (grant.engine.id, gateway.waited.held_us, gateway.waited.cold) == ("e1", 0, False)
    assert gateway.pokes == 0


async def test_a_hold_pokes_is_demanded_and_is_granted_when_the_engine_is_ready() -> None:
    gateway = Gateway()
    task = gateway.ask(BOT, slots=2)
    await settle()
    assert gateway.pokes == 1
    assert gateway.admission.collect().pools == {
        BOT.spec.pool: PoolDemand(waiting=2, arrivals=1, last_used_at=NOW, idle_timeout_s=600.0, caused_by="acme/bot")
    }
    gateway.fleet(engine(state=EngineState.STARTING))
    await settle()
    assert not task.done()
    gateway.fleet(engine())
    await task
    assert gateway.waited.cold
    assert 0 < gateway.waited.held_us <= gateway.waited.queued_us
    demand = gateway.admission.collect()
    assert (demand.engines, demand.pools[BOT.spec.pool].running) == ({"e1": 1}, 2)


async def test_i6_fifty_first_requests_are_fifty_slots_of_demand_with_one_cause() -> None:
    gateway = Gateway()
    tasks = [gateway.ask(BOT) for _ in range(50)]
    await settle()
    demand = gateway.admission.collect().pools[BOT.spec.pool]
    assert (demand.waiting, demand.arrivals, demand.caused_by) == (50, 50, "acme/bot")
    gateway.fleet(engine())
    for count in range(1, 51):
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert gateway.admission.running() <= 2
        for task in done:
            tasks.remove(task)
            task.result().release()
        if not tasks:
            break
        assert count < 50
    assert gateway.admission.running() == 0


async def test_slots_are_taken_in_order_and_a_release_wakes_the_next() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    first = await gateway.admit(BOT, slots=2, wait_s=1)
    tasks = [gateway.ask(BOT), gateway.ask(BOT), gateway.ask(BOT)]
    await settle()
    assert not any(task.done() for task in tasks)
    first.release()
    first.release()
    await settle()
    assert [task.done() for task in tasks] == [True, True, False]
    tasks[0].result().release()
    assert (await tasks[2]).engine.id == "e1"


async def test_i3_nothing_is_sent_to_an_engine_that_drains_and_only_then_is_the_fleet_acknowledged() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    running = await gateway.admit(BOT, slots=1, wait_s=1)
    gateway.fleet(engine(state=EngineState.DRAINING))
    demand = gateway.admission.collect()
    assert (demand.fleet_version, demand.engines) == (2, {"e1": 1})
    assert gateway.pokes == 1
    task = gateway.ask(BOT)
    await settle()
    assert not task.done()
    running.release()
    await settle()
    assert not task.done()
    assert gateway.admission.collect().engines == {}
    gateway.fleet(engine())
    assert (await task).engine.id == "e1"


async def test_a_client_that_leaves_a_hold_frees_its_place_at_once() -> None:
    gateway = Gateway()
    wide, narrow = gateway.ask(BOT, slots=2), gateway.ask(BOT)
    await settle()
    gateway.fleet(engine(), engine("e2", state=EngineState.STARTING))
    (await wide).release()
    await narrow
    blocked, behind = gateway.ask(BOT, slots=2), gateway.ask(BOT)
    await settle()
    assert not behind.done()
    blocked.cancel()
    await settle()
    assert behind.done()
    assert gateway.admission.waiting() == 0


async def test_a_client_that_leaves_in_the_moment_of_its_grant_gives_the_slots_back() -> None:
    gateway = Gateway()
    task = gateway.ask(BOT, slots=2)
    await settle()
    gateway.fleet(engine())
    assert gateway.admission.running() == 1
    task.cancel()
    await settle()
    assert task.cancelled()
    assert gateway.admission.running() == 0
    assert gateway.admission.collect().engines == {}


async def test_a_client_that_leaves_just_before_its_grant_gives_the_slots_back_too() -> None:
    gateway = Gateway()
    task = gateway.ask(BOT, slots=2)
    await settle()
    task.cancel()
    gateway.fleet(engine())
    await settle()
    assert task.cancelled()
    assert gateway.admission.running() == 0


async def test_i5_a_hold_ends_at_its_deadline_with_a_true_time_to_retry() -> None:
    gateway = Gateway()
    gateway.fleet(engine(state=EngineState.STARTING), status=status(start_s=40.0))
    gateway.now += 10
    with pytest.raises(HoldExpired) as refused:
        await gateway.admit(BOT, slots=1, wait_s=0.01)
    assert (refused.value.loading, refused.value.retry_s) == (True, 30.0)
    gateway.fleet(engine(state=EngineState.STARTING), status=status(start_s=400.0, blocked="no memory is free"))
    with pytest.raises(HoldExpired, match="no memory is free") as refused:
        await gateway.admit(BOT, slots=1, wait_s=0.01)
    assert refused.value.retry_s == 60.0
    assert gateway.admission.waiting() == 0


async def test_i5_a_hold_for_a_slot_that_stays_taken_ends_at_its_deadline() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    taken = await gateway.admit(BOT, slots=2, wait_s=1)
    with pytest.raises(HoldExpired) as refused:
        await gateway.admit(BOT, slots=1, wait_s=0.01)
    assert not refused.value.loading
    taken.release()


async def test_i5_holds_fail_at_once_when_the_start_has_failed() -> None:
    gateway = Gateway()
    tasks = [gateway.ask(BOT), gateway.ask(BOT)]
    await settle()
    gateway.fleet(engine(state=EngineState.FAILED), status=status(failure=FAILURE))
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, LoadFailed)
        assert result.retry_s == 60.0
        assert "2 times in a row" in str(result)
        assert "the weights do not load" in str(result)
    with pytest.raises(LoadFailed):
        await gateway.admit(BOT, slots=1, wait_s=60)
    assert gateway.admission.availability(BOT.spec.pool) == ("failed", None)


async def test_after_the_back_off_a_request_holds_again_so_that_a_new_start_is_tried() -> None:
    gateway = Gateway()
    gateway.fleet(status=status(failure=FAILURE))
    gateway.now = FAILURE.retry_at
    task = gateway.ask(BOT)
    await settle()
    assert not task.done()
    gateway.fleet(engine(state=EngineState.STARTING), status=status(failure=FAILURE))
    await settle()
    assert not task.done()
    gateway.fleet(engine(), status=status())
    await task


async def test_a_failed_start_hurts_nobody_while_another_engine_is_ready() -> None:
    gateway = Gateway()
    gateway.fleet(engine(), engine("e2", EngineState.FAILED), status=status(failure=FAILURE))
    assert (await gateway.admit(BOT, slots=1, wait_s=1)).engine.id == "e1"


async def test_a_full_queue_refuses_and_a_variants_cap_holds() -> None:
    gateway = Gateway(queue_length=1)
    gateway.fleet(engine())
    capped = variant("capped", cap=1)
    running = await gateway.admit(capped, slots=1, wait_s=1)
    task = gateway.ask(capped)
    await settle()
    with pytest.raises(QueueFull):
        await gateway.admit(BOT, slots=1, wait_s=1)
    running.release()
    await task


async def test_a_suspected_engine_is_passed_over_until_it_says_that_it_is_healthy() -> None:
    gateway = Gateway()
    one, two = engine("e1"), engine("e2")
    gateway.fleet(one, two)
    gateway.sick = {"e1"}
    gateway.admission.suspect(one)
    for _ in range(2):
        assert (await gateway.admit(BOT)).engine.id == "e2"
    task = gateway.ask(BOT)
    await settle()
    assert not task.done()
    gateway.sick = set()
    assert (await task).engine.id == "e1"


async def test_i7_a_request_that_a_healthy_engine_cannot_digest_does_not_make_others_wait() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    gateway.admission.suspect(engine())
    await settle()
    assert (await gateway.admit(BOT, wait_s=0.01)).engine.id == "e1"


async def test_a_suspicion_ends_with_the_engine() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    gateway.sick = {"e1"}
    gateway.admission.suspect(engine())
    gateway.fleet()
    await settle()
    gateway.sick = set()
    gateway.fleet(engine())
    assert (await gateway.admit(BOT, wait_s=5)).engine.id == "e1"


async def test_a_hold_that_gets_nothing_has_waited_all_the_same() -> None:
    gateway = Gateway()
    with pytest.raises(HoldExpired):
        await gateway.admit(BOT, wait_s=0.02)
    assert gateway.waited.queued_us == gateway.waited.held_us >= 19_000
    gateway.fleet(engine())
    taken = await gateway.admit(BOT, slots=2)
    with pytest.raises(HoldExpired):
        await gateway.admit(BOT, wait_s=0.02)
    assert gateway.waited.queued_us >= 19_000
    assert gateway.waited.held_us == 0
    taken.release()


async def test_closing_ends_holds_and_refuses_but_lets_grants_live() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    running = await gateway.admit(BOT, slots=2, wait_s=1)
    task = gateway.ask(BOT)
    await settle()
    gateway.admission.close()
    with pytest.raises(AdmissionClosed):
        await task
    with pytest.raises(NotAdmitted):
        await gateway.admit(BOT, slots=1, wait_s=1)
    demand = gateway.admission.collect()
    assert (demand.leaving, demand.engines) == (True, {"e1": 1})
    running.release()
    assert gateway.admission.collect().engines == {}


async def test_the_longest_keep_alive_among_those_used_is_reported_and_forgotten_with_the_engine() -> None:
    gateway = Gateway()
    gateway.fleet(engine())
    for each in (BOT, variant("patient", idle_s=3600.0)):
        (await gateway.admit(each, slots=1, wait_s=1)).release()
    assert gateway.admission.collect().pools[BOT.spec.pool].idle_timeout_s == 3600.0
    gateway.fleet()
    assert gateway.admission.collect().pools[BOT.spec.pool].idle_timeout_s == 0.0
    gateway.fleet(engine())
    (await gateway.admit(BOT, slots=1, wait_s=1)).release()
    assert gateway.admission.collect().pools[BOT.spec.pool].idle_timeout_s == 600.0


async def test_availability_follows_the_fleet() -> None:
    gateway = Gateway()
    pool = BOT.spec.pool
    gateway.fleet(status=status())
    assert gateway.admission.availability(pool) == ("cold", 4.0)
    gateway.fleet(engine(state=EngineState.STARTING), status=status())
    gateway.now += 1
    assert gateway.admission.availability(pool) == ("loading", 3.0)
    gateway.fleet(engine())
    assert gateway.admission.availability(pool) == ("ready", 0.0)
    assert msgspec.json.encode(gateway.admission.collect())
