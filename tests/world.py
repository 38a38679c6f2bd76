"""A small world around a roster: gateways, requests, a node that fails, controllers that restart; on one event heap.

It plays what `controller` does (durable changes first, then processes) and checks what must always hold:

- every change continues the interval before it, by the table of the life cycle;
- I3: an engine that is stopped has nothing in flight, unless it was forced or has exited by itself;
- I4: reservations never exceed a device, and whatever is on the node has its memory reserved.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from deciding import device, engine_id, gateway
from msgspec import Struct

from engines.errors import LaunchFailed
from engines.launchers.launcher import Exited
from engines.launchers.memory import Behaviour, MemoryNode
from engines.lifecycle import HAS_PROCESS, HOLDS_MEMORY, TABLE
from engines.model import (
    Demand,
    Engine,
    EngineId,
    EngineState,
    Fleet,
    GatewayId,
    PoolDemand,
    PoolId,
    Variant,
)
from engines.roster import Change, Roster

S = EngineState
TICK_S = 0.25
REPORT_S = 0.5
HOLD_S = 25.0
GRACE_S = 3.0


class Policy(Struct, frozen=True):
    max_engines_per_pool: int = 4
    backoff_s: float = 0.5
    backoff_max_s: float = 8.0


@dataclass(eq=False)
class Request:
    pool: PoolId
    name: str
    arrived_at: float
    lasts_s: float
    engine: EngineId | None = None
    outcome: str | None = None


@dataclass(eq=False)
class Gateway:
    id: GatewayId
    fleet: Fleet | None = None
    held: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    arrivals: Counter[PoolId] = field(default_factory=Counter)
    used_at: dict[PoolId, float] = field(default_factory=dict)
    reported_at: float = 0.0


class World:
    def __init__(
        self, seed: int, variants: Iterable[Variant], memory: int, behaviour: Callable[[Engine], Behaviour]
    ) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.variants = tuple(variants)
        self._pools = {variant: variant.spec.pool for variant in self.variants}
        self._timeouts = {self._pools[v]: v.scaling.idle_timeout_s for v in self.variants}
        self.device = device(memory)
        self.node = MemoryNode([self.device], behaviour=behaviour)
        self.stored: dict[EngineId, Engine] = {}
        self.intervals: dict[EngineId, list[Change]] = {}
        self.forced: set[EngineId] = set()
        self.requests: list[Request] = []
        self.events = 0
        self._ids = itertools.count(1)
        self._gateways = itertools.count(1)
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self.gateways = [Gateway(gateway(next(self._gateways))) for _ in range(2)]
        self.epoch = 0
        self.lead()

    # Time ---------------------------------------------------------------------------------------------------------

    def at(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), what))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, what = heapq.heappop(self._heap)
            self.events += 1
            what()
        self.now = end

    # Controller ---------------------------------------------------------------------------------------------------

    def lead(self) -> None:
        """A new controller takes over; whatever the old one was waiting for is forgotten."""
        self.epoch += 1
        self.roster = Roster(
            epoch=self.epoch,
            since=self.now,
            policy=Policy(),
            devices=[self.device],
            new_id=lambda: engine_id(next(self._ids)),
        )
        self.roster.catalog_changed(self.variants)
        known = {id_ for id_, engine in self.stored.items() if engine.state in HAS_PROCESS}
        for stray in self.node.present - known:
            self.node.end(stray)
        self.make(self.roster.adopt(tuple(self.stored.values()), self.node.running, self.now))
        for engine in tuple(self.roster.engines.values()):
            if engine.state in {S.STOPPING, S.FAILED}:
                self._stop(engine)
        self._tick(self.epoch)

    def _tick(self, epoch: int) -> None:
        if epoch == self.epoch:
            self.round()
            self.at(TICK_S, lambda: self._tick(epoch))

    def round(self) -> None:
        for event in self.node.due(self.now):
            if isinstance(event, Exited):
                self._lose(event.engine)
            self.make(self.roster.event(event, self.now))
        decisions = self.roster.decide(self.now)
        self.make(decisions.changes)
        for engine, how in decisions.probes:
            self.roster.probed(engine.id, how, self.in_flight(engine.id) if engine.id in self.node.running else None)
        fleet = self.roster.fleet(self.now)
        for one in self.gateways if fleet is not None else ():
            self.at(self.random.uniform(0.0, 0.4), lambda one=one, fleet=fleet: self._see(one, fleet))

    def make(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._check(change)
            engine = change.after
            self.intervals.setdefault(engine.id, []).append(change)
            if engine.state is S.STOPPED:
                self.stored.pop(engine.id)
            else:
                self.stored[engine.id] = engine
            if engine.state is S.PLACED:
                self._start(engine)
            elif engine.state in {S.STOPPING, S.FAILED}:
                self._stop(engine)

    def _check(self, change: Change) -> None:
        engine, before = change.after, self.intervals.get(change.after.id, [])
        if not before:
            assert change.before is None and engine.state is S.PLACED
        else:
            last = before[-1].after
            assert change.before is last.state
            assert engine.state in TABLE[last.state]
            assert engine.since >= last.since
        if engine.state is S.STOPPING and engine.id not in self.forced:
            assert self.in_flight(engine.id) == 0 or engine.id not in self.node.running, "I3"
        if engine.state is S.STOPPED:
            assert engine.id not in self.node.present, "I4: memory is given out while something is left"
        now = {**self.stored, engine.id: engine}
        reserved = sum(e.memory_bytes for e in now.values() if e.state in HOLDS_MEMORY)
        assert reserved <= self.device.memory_bytes, "I4"
        assert {e.id for e in now.values() if e.state in HOLDS_MEMORY} >= self.node.present, "I4"

    def _start(self, engine: Engine) -> None:
        epoch = self.epoch

        def started() -> None:
            if epoch != self.epoch:
                return  # an engine host refuses an older epoch
            try:
                process = self.node.start(engine, self.now)
            except LaunchFailed as error:
                self.make(self.roster.start_failed(engine.id, str(error), self.now))
            else:
                self.make(self.roster.started(engine.id, process, self.now))

        self.at(self.random.uniform(0.0, 0.2), started)

    def _stop(self, engine: Engine) -> None:
        epoch = self.epoch

        def stopped() -> None:
            if epoch == self.epoch:
                self._lose(engine.id)
                self.node.end(engine.id)
                self.make(self.roster.stopped(engine.id, self.now))

        self.at(min(self.node.stop_s(engine.id), GRACE_S), stopped)

    # Gateways -----------------------------------------------------------------------------------------------------

    def arrive(self, variant: Variant, lasts_s: float) -> Request:
        pool = self._pools[variant]
        request = Request(pool, variant.name, self.now, lasts_s)
        self.requests.append(request)
        one = self.random.choice(self.gateways)
        one.held.append(request)
        one.arrivals[pool] += 1
        one.used_at[pool] = self.now
        self.at(HOLD_S, lambda: self._give_up(one, request))
        self._dispatch(one)
        if one.held:
            self.report(one)
        return request

    def _give_up(self, one: Gateway, request: Request) -> None:
        if request in one.held:
            one.held.remove(request)
            request.outcome = "hold_expired"

    def _see(self, one: Gateway, fleet: Fleet) -> None:
        if one.fleet is None or (fleet.epoch, fleet.version) > (one.fleet.epoch, one.fleet.version):
            one.fleet = fleet
            self._dispatch(one)
            self.report(one)

    def _dispatch(self, one: Gateway) -> None:
        fleet = one.fleet
        for request in list(one.held) if fleet is not None else []:
            assert fleet is not None
            for engine in fleet.engines:
                if engine.pool != request.pool or engine.state is not S.READY:
                    continue
                if self.in_flight(engine.id) < engine.slots:
                    one.held.remove(request)
                    self._send(one, request, engine.id)
                    break

    def _send(self, one: Gateway, request: Request, engine: EngineId) -> None:
        if engine not in self.node.running:
            request.outcome = "engine_failed"
            return
        request.engine = engine
        one.running.append(request)

        def done() -> None:
            if request in one.running:
                one.running.remove(request)
                one.used_at[request.pool] = self.now
                request.outcome = "completed"
                for other in self.gateways:
                    self._dispatch(other)

        self.at(request.lasts_s, done)

    def _lose(self, engine: EngineId) -> None:
        """The engine's process is gone, and with it what it was doing."""
        for one in self.gateways:
            for request in [r for r in one.running if r.engine == engine]:
                one.running.remove(request)
                request.outcome = "engine_failed"

    def in_flight(self, engine: EngineId) -> int:
        return sum(request.engine == engine for one in self.gateways for request in one.running)

    def report(self, one: Gateway) -> None:
        demand = self._demand(one)
        self.at(self.random.uniform(0.0, 0.1), lambda: self.roster.demand_received(demand, self.now))

    def reporting(self) -> None:
        for one in self.gateways:
            self.report(one)
        self.at(REPORT_S, self.reporting)

    def _demand(self, one: Gateway) -> Demand:
        pools: dict[PoolId, PoolDemand] = {}
        for pool in one.arrivals:
            held = [r for r in one.held if r.pool == pool]
            pools[pool] = PoolDemand(
                running=sum(r.pool == pool for r in one.running),
                waiting=len(held),
                arrivals=one.arrivals[pool],
                last_used_at=one.used_at[pool],
                idle_timeout_s=self._timeouts[pool],
                caused_by=held[0].name if held else None,
            )
        fleet = one.fleet
        return Demand(
            gateway=one.id,
            at=self.now,
            fleet_epoch=fleet.epoch if fleet else 0,
            fleet_version=fleet.version if fleet else 0,
            pools=pools,
            engines=dict(Counter(r.engine for r in one.running if r.engine)),
        )

    # Mischief -----------------------------------------------------------------------------------------------------

    def kill_engine(self) -> None:
        if self.node.running:
            self.node.kill(self.random.choice(sorted(self.node.running)), self.now)

    def kill_gateway(self) -> None:
        """Its connections close, so what it had in flight is aborted; a new one comes in its place."""
        index = self.random.randrange(len(self.gateways))
        for request in (*self.gateways[index].running, *self.gateways[index].held):
            request.outcome = "gateway_lost"
        self.gateways[index].running.clear()
        self.gateways[index].held.clear()
        self.gateways[index] = Gateway(gateway(next(self._gateways)), fleet=self.roster._published)

    def order_stop(self, *, force: bool) -> None:
        if self.roster.engines:
            id_ = self.random.choice(sorted(self.roster.engines))
            if force:
                self.forced.add(id_)
            self.make(self.roster.stop(id_, self.now, force=force))

    # Results ------------------------------------------------------------------------------------------------------

    def starts(self, pool: PoolId | None = None) -> int:
        return sum(pool in {None, changes[0].after.pool} for changes in self.intervals.values())

    def check_over(self) -> None:
        """After the mischief: intervals of engines that are over end with STOPPED, no others do."""
        for id_, changes in self.intervals.items():
            assert (changes[-1].after.state is S.STOPPED) == (id_ not in self.stored)
            for before, after in itertools.pairwise(changes):
                assert after.before is before.after.state
        assert self.node.present == {e.id for e in self.stored.values() if e.state in HAS_PROCESS}
        assert [request for request in self.requests if request.outcome is None] == []
