"""What is to be done about the engines now: one pure function from what is known to a tuple of actions.

    decide(situation) -> Plan(actions, pools)

In order:

1. An engine that drains goes on to stop once no gateway can send it anything (each live one has seen that it drains)
   and none has anything in flight on it; then the engine itself is asked (`Probe`), and stopped if it has nothing
   either (I3).
2. An engine whose pool no variant names any more drains.
3. A pool that wants more engines than are ready or on their way takes back those that drain for want of work
   (`Undrain`), then starts new ones, promises before demand, longest hold first. It starts where there is room. Where
   there is none it waits for what is leaving already, else has idle engines of other pools drain, else says why it is
   blocked. What it waits for is kept for it: a smaller engine of a less urgent pool doesn't slip in.
4. A ready engine beyond what its pool wants drains when its keep-alive is over (`keepalive`).

Nothing is decided for a pool before its variants are known. Within `demand.REPORT_LIFE_S` of a controller's start no
engine drains for want of work and none stops: until then a silent gateway can't be told from none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct, field

from engines import demand, keepalive, placement, scaling
from engines.actions import REVERSIBLE, Action, Drain, Draining, Probe, Reason, Start, Stop, Undrain
from engines.demand import NOTHING, PoolTotals, Reports
from engines.lifecycle import PENDING
from engines.model import Device, Engine, EngineId, EngineState, PoolId
from engines.placement import Candidate
from engines.pools import PoolConfig, PoolHistory


class Policy(Protocol):
    """What an operator sets; `ControllerSettings` has it."""

    @property
    def max_engines_per_pool(self) -> int:
        """The most engines that a pool may have ready or on their way."""

    @property
    def backoff_s(self) -> float:
        """First wait after a failed start."""

    @property
    def backoff_max_s(self) -> float:
        """Longest wait after failed starts in a row."""


class PoolPlan(Struct, frozen=True):
    """What is wanted of a pool, and what is in the way."""

    desired: int
    blocked: str | None = None


class Plan(Struct, frozen=True):
    """What to do, in this order, and what to say about each pool."""

    actions: tuple[Action, ...] = ()
    pools: Mapping[PoolId, PoolPlan] = {}


class Situation(Struct, frozen=True, kw_only=True):
    """Everything that a decision may depend on."""

    now: float
    since: float
    """When this controller began."""
    epoch: int
    engines: Mapping[EngineId, Engine]
    devices: tuple[Device, ...]
    configs: Mapping[PoolId, PoolConfig] | None
    """`None`: the variants are not known yet."""
    histories: Mapping[PoolId, PoolHistory]
    reports: Reports
    draining: Mapping[EngineId, Draining]
    max_engines_per_pool: int
    closing: bool = False
    """The installation stops: nothing is started, everything drains."""


def decide(situation: Situation) -> Plan:
    """What to do now; the numbers are those of the module's docstring."""
    work = _Work(situation)
    work.finish_draining()  # 1
    if situation.closing:
        work.drain_everything()  # 2
    elif situation.configs is not None:
        work.drain_unnamed()  # 2
        work.fill()  # 3
        work.let_go()  # 4
    return Plan(tuple(work.actions), work.plans)


class _Pool(Struct, kw_only=True):
    """One pool while a decision is made."""

    config: PoolConfig
    history: PoolHistory
    totals: PoolTotals
    ready: list[Engine] = field(default_factory=list)
    pending: int = 0
    promised: int = 0
    want: int = 0
    """Promised or demanded, whichever is more."""
    fit: int = 0
    """Engines that all in the system would fill."""

    @property
    def have(self) -> int:
        return len(self.ready) + self.pending


class _Work:
    """A decision being made: what is still free, what has been claimed, what was decided so far."""

    def __init__(self, situation: Situation) -> None:
        self.s = situation
        self.actions: list[Action] = []
        self.plans: dict[PoolId, PoolPlan] = {}
        self.in_flight = demand.in_flight(situation.reports)
        self.free = placement.free(situation.devices, situation.engines.values())
        self.coming = placement.coming(situation.engines.values())
        self.leaving: set[EngineId] = set()
        self.settled = situation.now >= situation.since + demand.REPORT_LIFE_S
        self.pools = self._pools()

    def _pools(self) -> dict[PoolId, _Pool]:
        totals = demand.totals(self.s.reports)
        pools = {
            pool: _Pool(config=config, history=self.s.histories[pool], totals=totals.get(pool, NOTHING))
            for pool, config in (self.s.configs or {}).items()
        }
        for engine in self.s.engines.values():
            pool = pools.get(engine.pool)
            if pool is None:
                continue
            if engine.state is EngineState.READY:
                pool.ready.append(engine)
            elif engine.state in PENDING:
                pool.pending += 1
        for pool in pools.values():
            self._measure(pool)
        return pools

    def _measure(self, pool: _Pool) -> None:
        most = self.s.max_engines_per_pool
        pool.promised = scaling.promised(pool.config, most=most)
        pool.fit = scaling.fitting(pool.config, pool.totals, most=most)
        demanded = scaling.demanded(
            pool.config,
            pool.totals,
            pool.history,
            ready=len(pool.ready),
            pending=pool.pending,
            most=most,
            now=self.s.now,
        )
        pool.want = max(pool.promised, demanded)

    # 1 ----------------------------------------------------------------------------------------------------------------

    def finish_draining(self) -> None:
        """Stop, or ask, each draining engine that no gateway uses or will use."""
        if not self.settled and not self.s.closing:
            return
        acknowledged = demand.acknowledged(self.s.reports)
        for engine, draining in self.s.draining.items():
            seen = acknowledged is None or acknowledged >= (self.s.epoch, draining.version)
            if not seen or self.in_flight.get(engine):
                continue
            self.actions.append(Stop(engine, draining.reason) if draining.empty else Probe(engine))
            if draining.empty:
                self.leaving.add(engine)

    # 2 ----------------------------------------------------------------------------------------------------------------

    def drain_everything(self) -> None:
        """The installation stops."""
        for engine in self.s.engines.values():
            if engine.state is EngineState.READY:
                self._drain(engine, Reason.SHUTDOWN)
            elif engine.state is EngineState.STARTING:
                self.actions.append(Stop(engine.id, Reason.SHUTDOWN))

    def drain_unnamed(self) -> None:
        """No variant names their pool."""
        for engine in self.s.engines.values():
            if engine.state is EngineState.READY and engine.pool not in self.pools:
                self._drain(engine, Reason.UNNAMED)

    def _drain(self, engine: Engine, reason: Reason) -> None:
        self.actions.append(Drain(engine.id, reason))
        self.coming[engine.device] = self.coming.get(engine.device, 0) + engine.memory_bytes

    # 3 ----------------------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Give each pool the engines that it wants, as far as there is room."""
        self._undrain()
        short = [pool for pool in self.pools.values() if pool.want > pool.have]
        for pool in sorted(short, key=self._urgency):
            failure = pool.history.failure
            if failure is not None and self.s.now < failure.retry_at:
                continue
            while pool.want > pool.have:
                blocked = self._start(pool)
                if blocked is not None:
                    self.plans[pool.config.pool] = PoolPlan(pool.want, blocked)
                    break

    def _undrain(self) -> None:
        for id_, draining in self.s.draining.items():
            engine = self.s.engines[id_]
            pool = self.pools.get(engine.pool)
            if pool is None or draining.reason not in REVERSIBLE or id_ in self.leaving:
                continue
            if max(pool.want, pool.fit if pool.totals.waiting else 0) > pool.have:
                self.actions.append(Undrain(id_))
                self.coming[engine.device] -= engine.memory_bytes
                pool.ready.append(engine)

    def _urgency(self, pool: _Pool) -> tuple[bool, float, PoolId]:
        """Promises first, then the longest hold."""
        waiting_since = pool.history.waiting_since
        return (
            pool.have >= pool.promised,
            self.s.now if waiting_since is None else waiting_since,
            pool.config.pool,
        )

    def _start(self, pool: _Pool) -> str | None:
        """Start one engine, or make room for it; says what is in the way if it could not be started now."""
        need = pool.config.footprint.total
        device = placement.fit(need, self.free)
        if device is not None:
            self.free[device] -= need
            pool.pending += 1
            cause = pool.totals.caused_by or pool.config.promised_to
            self.actions.append(Start(pool=pool.config.pool, device=device, memory_bytes=need, caused_by=cause))
            return None
        return self._make_room(pool, need)

    def _make_room(self, pool: _Pool, need: int) -> str:
        size = placement.gigabytes
        available = {device: left + self.coming.get(device, 0) for device, left in self.free.items()}
        device = placement.fit(need, available)
        if device is None:
            eviction = placement.evict(need, available, self._candidates(pool)) if self.settled else None
            if eviction is None:
                most = max(self.free.values(), default=0)
                return f"an engine needs {size(need)}, {size(max(0, most))} is free and nothing idle can make room"
            for engine in eviction.engines:
                self._evict(self.s.engines[engine])
            device = eviction.device
        self.free[device] -= need
        return f"waiting for {size(need)} on {device} that other engines are giving back"

    def _candidates(self, needy: _Pool) -> list[Candidate]:
        """Ready engines of other pools that could leave without breaking a promise or sending anyone to the queue."""
        candidates: list[Candidate] = []
        for pool in self.pools.values():
            spare = len(pool.ready) - max(pool.want, pool.fit)
            if pool is needy or spare <= 0 or pool.totals.waiting:
                continue
            idle = [engine for engine in pool.ready if self._evictable(engine)]
            idle.sort(key=lambda engine: (keepalive.last_used_at(engine, pool.history), engine.id))
            candidates += [
                Candidate(engine.id, engine.device, engine.memory_bytes, keepalive.last_used_at(engine, pool.history))
                for engine in idle[:spare]
            ]
        return candidates

    def _evictable(self, engine: Engine) -> bool:
        return engine.state is EngineState.READY and not self.in_flight.get(engine.id)

    def _evict(self, engine: Engine) -> None:
        self._drain(engine, Reason.PRESSURE)
        self.pools[engine.pool].ready.remove(engine)

    # 4 ----------------------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Drain what is no longer needed, one engine a pool and decision, and say what is wanted of each pool."""
        for id_, pool in self.pools.items():
            leaving = self._surplus(pool)
            if leaving is not None:
                self._drain(leaving, Reason.IDLE)
                pool.ready.remove(leaving)
            said = self.plans.get(id_)
            self.plans[id_] = PoolPlan(max(pool.want, pool.have), said.blocked if said else None)

    def _surplus(self, pool: _Pool) -> Engine | None:
        """The ready engine with least in flight, if the pool has more than it wants and the keep-alive is over."""
        count = len(pool.ready)
        if count <= pool.want or not self.settled:
            return None
        choices = [
            engine
            for engine in pool.ready
            if engine.state is EngineState.READY
            and keepalive.over(engine, pool.config, pool.history, count=count, now=self.s.now)
        ]
        return min(choices, key=lambda engine: (self.in_flight.get(engine.id, 0), engine.id), default=None)
