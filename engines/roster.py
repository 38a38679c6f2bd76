"""Every engine that isn't over, what is known of its pool, and how both change. Pure: the controller without its I/O.

The roster is told what happened (`demand_received`, `started`, `event`, `stopped`, …) and asked what to do (`decide`).
What it changes it returns as `Change`s, each one step of the life cycle. The owner (`controller`, or a simulator) makes
each durable in order before anything else, then lets processes follow: a change to PLACED wants a start, one to
STOPPING or FAILED a stop. Then `fleet` says whether there is something new to publish. One owner, one thread; time is
an argument and never goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from engines import demand, failures, keepalive, pools
from engines.actions import Drain, Draining, Probe, Reason, Start, Stop, Undrain
from engines.demand import NOTHING, Reports
from engines.launchers.launcher import Exited, LaunchEvent, Ready, Started
from engines.lifecycle import PENDING, transition
from engines.model import Demand, Device, Engine, EngineId, EngineState, Fleet, PoolId, PoolStatus, Variant
from engines.plan import Plan, Policy, Situation, decide
from engines.pools import PoolConfig, PoolHistory

_S = EngineState


class Change(Struct, frozen=True, kw_only=True):
    """One step in an engine's life."""

    before: EngineState | None
    """`None`: it was placed just now."""
    after: Engine
    reason: str | None = None
    """Why, for the log."""
    last_lines: tuple[str, ...] = ()
    """Of the log of an engine that failed."""


class Decisions(Struct, frozen=True):
    """What `decide` changed, and which draining engines should be asked how much they have in flight."""

    changes: tuple[Change, ...]
    probes: tuple[tuple[Engine, Draining], ...]


class Roster:
    """The engines and pools that a controller answers for."""

    def __init__(
        self,
        *,
        epoch: int,
        since: float,
        policy: Policy,
        devices: Sequence[Device],
        new_id: Callable[[], EngineId],
        start_times: Mapping[PoolId, float] | None = None,
    ) -> None:
        self.epoch = epoch
        self.engines: dict[EngineId, Engine] = {}
        self.draining: dict[EngineId, Draining] = {}
        self.closing = False
        self._since = since
        self._policy = policy
        self._devices = tuple(devices)
        self._new_id = new_id
        self._reports: Reports = {}
        self._configs: dict[PoolId, PoolConfig] | None = None
        self._histories = {
            pool: PoolHistory(since=since, start_s=start_s) for pool, start_s in (start_times or {}).items()
        }
        self._early: dict[EngineId, LaunchEvent] = {}
        self._doomed: set[EngineId] = set()
        self._plan = Plan()
        self._published = Fleet(epoch=epoch, version=0, at=since)

    # What is known ----------------------------------------------------------------------------------------------------

    def config(self, pool: PoolId) -> PoolConfig | None:
        """A pool's settings; `None` if no variant names it."""
        return (self._configs or {}).get(pool)

    def history(self, pool: PoolId) -> PoolHistory:
        """What has been seen of a pool."""
        return self._histories.get(pool) or PoolHistory(since=self._since)

    def fleet(self, now: float) -> Fleet | None:
        """The next version to publish, or `None` if it would say nothing new."""
        old = self._published
        new = Fleet(
            epoch=self.epoch,
            version=old.version + 1,
            at=now,
            engines=tuple(sorted(self.engines.values(), key=lambda engine: engine.id)),
            pools=tuple(self._status(pool) for pool in sorted(self._configs or {})),
            devices=self._devices,
        )
        if (new.engines, new.pools, new.devices) == (old.engines, old.pools, old.devices) and old.version:
            return None
        self._published = new
        return new

    def _status(self, pool: PoolId) -> PoolStatus:
        history, planned = self.history(pool), self._plan.pools.get(pool)
        return PoolStatus(
            pool=pool,
            desired=planned.desired if planned else 0,
            start_s=history.start_s,
            failure=history.failure,
            blocked=planned.blocked if planned else None,
        )

    # What is wanted ---------------------------------------------------------------------------------------------------

    def demand_received(self, report: Demand, now: float) -> None:
        """A gateway has reported."""
        self._reports = demand.receive(self._reports, report, now)

    def catalog_changed(self, variants: Iterable[Variant]) -> None:
        """These are all the variants now."""
        self._configs = pools.of(variants)

    def prewarm(self, pool: PoolId, now: float) -> bool:
        """An operator wants an engine ready; false if no variant names the pool."""
        config = self.config(pool)
        if config is None:
            return False
        history = self.history(pool)
        timeout_s = keepalive.idle_timeout_s(config, history)
        self._histories[pool] = pools.prewarm(history, idle_timeout_s=timeout_s, now=now)
        return True

    def stop(self, id_: EngineId, now: float, *, force: bool = False) -> tuple[Change, ...]:
        """An operator wants an engine to end: once it is drained, or at once with `force`."""
        engine = self.engines.get(id_)
        if engine is None:
            return ()
        self._histories[engine.pool] = pools.unwanted(self.history(engine.pool))
        if engine.state is _S.PLACED:
            self._doomed.add(id_)  # a fork can't be called back; `started` ends it
            return ()
        if engine.state in {_S.STARTING, _S.WAKING, _S.ASLEEP}:
            return (self._change(engine, _S.STOPPING, now, Reason.OPERATOR),)
        changes: tuple[Change, ...] = ()
        if engine.state is _S.READY:
            changes = (self._drain(engine, Reason.OPERATOR, now),)
        elif engine.state is _S.DRAINING:
            self.draining[id_] = replace(self.draining[id_], reason=Reason.OPERATOR)
        if force and id_ in self.draining:
            changes += (self._change(self.engines[id_], _S.STOPPING, now, Reason.OPERATOR),)
        return changes

    def close(self) -> None:
        """The installation stops: from now on nothing starts and everything drains."""
        self.closing = True

    def stop_all(self, now: float) -> tuple[Change, ...]:
        """The time to drain is over: end what is still there, whatever it has in flight."""
        changes: tuple[Change, ...] = ()
        for id_ in list(self.engines):
            changes += self.stop(id_, now, force=True)
        return changes

    # What happened ----------------------------------------------------------------------------------------------------

    def adopt(
        self,
        engines: Iterable[Engine],
        alive: Collection[EngineId],
        now: float,
        *,
        last_lines: Callable[[EngineId], tuple[str, ...]] = lambda _: (),
    ) -> tuple[Change, ...]:
        """Take over what an earlier controller left: engines as stored, and those of them whose process is alive.

        Ready ones stay so, starting ones are watched on, stopping and failed ones are to be stopped by the owner. What
        was placed and not started is over; what has lost its process has failed, with `last_lines` in its log.
        """
        changes: list[Change] = []
        for engine in engines:
            self.engines[engine.id] = engine
            if engine.state is _S.DRAINING:
                self.draining[engine.id] = Draining(Reason.ADOPTED, self._published.version + 1)
            if engine.state is _S.PLACED:
                changes.append(self._change(engine, _S.STOPPED, now, "its controller ended before it was started"))
            elif engine.id not in alive:
                gone = Exited(engine=engine.id, reason="its process was gone", last_lines=last_lines(engine.id))
                changes += self.event(gone, now)
        return tuple(changes)

    def started(self, id_: EngineId, process: Started, now: float) -> tuple[Change, ...]:
        """A placed engine's process exists."""
        engine = replace(self.engines[id_], address=process.address, pid=process.pid, pid_start=process.pid_start)
        changes: tuple[Change, ...] = (self._change(engine, _S.STARTING, now, None),)
        early = self._early.pop(id_, None)
        if early is not None:
            changes += self.event(early, now)
        if id_ in self._doomed:
            self._doomed.discard(id_)
            changes += self.stop(id_, now)
        return changes

    def start_failed(
        self, id_: EngineId, reason: str, now: float, *, last_lines: tuple[str, ...] = ()
    ) -> tuple[Change, ...]:
        """A placed engine got no process."""
        self._doomed.discard(id_)
        engine = replace(self.engines[id_], failure=reason)
        self._start_failed(engine.pool, reason, last_lines, now)
        return (self._change(engine, _S.STOPPED, now, reason, last_lines),)

    def event(self, event: LaunchEvent, now: float) -> tuple[Change, ...]:
        """The launcher saw something. What it saw before the start was reported is kept until then."""
        engine = self.engines.get(event.engine)
        if engine is None or engine.state in {_S.STOPPING, _S.FAILED}:
            return ()
        if engine.state is _S.PLACED:
            self._early[engine.id] = event
            return ()
        if isinstance(event, Ready):
            return self._ready(engine, event, now)
        if engine.state in PENDING:
            self._start_failed(engine.pool, event.reason, event.last_lines, now)
        failed = replace(engine, failure=event.reason)
        return (self._change(failed, _S.FAILED, now, event.reason, event.last_lines),)

    def _ready(self, engine: Engine, event: Ready, now: float) -> tuple[Change, ...]:
        if engine.state not in PENDING:
            return ()
        history = pools.succeeded(self.history(engine.pool), start_s=now - engine.created_at)
        self._histories[engine.pool] = history
        ready = replace(engine, ready_at=now, phases_us=event.phases_us)
        return (self._change(ready, _S.READY, now, None),)

    def _start_failed(self, pool: PoolId, reason: str, last_lines: tuple[str, ...], now: float) -> None:
        self._histories[pool] = pools.failed(
            self.history(pool),
            failures.hint(reason, last_lines),
            backoff_s=self._policy.backoff_s,
            backoff_max_s=self._policy.backoff_max_s,
            now=now,
        )

    def probed(self, id_: EngineId, asked: Draining, in_flight: int | None) -> None:
        """A draining engine said how much it has in flight (`None`: it didn't answer), having been asked as `asked`."""
        if self.draining.get(id_) == asked and not in_flight:
            self.draining[id_] = replace(asked, empty=True)

    def stopped(self, id_: EngineId, now: float) -> tuple[Change, ...]:
        """Nothing of a stopping or failed engine is left; its memory may be given out."""
        engine = self.engines.get(id_)
        return () if engine is None else (self._change(engine, _S.STOPPED, now, None),)

    # What to do -------------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> Decisions:
        """Look at everything and do what `plan` says."""
        self._reports = demand.expire(self._reports, now)
        self._observe(now)
        self._plan = decide(
            Situation(
                now=now,
                since=self._since,
                epoch=self.epoch,
                engines=self.engines,
                devices=self._devices,
                configs=self._configs,
                histories=self._histories,
                reports=self._reports,
                draining=self.draining,
                max_engines_per_pool=self._policy.max_engines_per_pool,
                closing=self.closing,
            )
        )
        changes: list[Change] = []
        probes: list[tuple[Engine, Draining]] = []
        for action in self._plan.actions:
            match action:
                case Start():
                    changes.append(self._place(action, now))
                case Drain(engine, reason):
                    changes.append(self._drain(self.engines[engine], reason, now))
                case Undrain(engine):
                    changes.append(self._change(self.engines[engine], _S.READY, now, "demand"))
                case Stop(engine, reason):
                    changes.append(self._change(self.engines[engine], _S.STOPPING, now, reason))
                case Probe(engine):
                    probes.append((self.engines[engine], self.draining[engine]))
        return Decisions(tuple(changes), tuple(probes))

    def _observe(self, now: float) -> None:
        totals = demand.totals(self._reports)
        states: dict[PoolId, list[EngineState]] = {}
        for engine in self.engines.values():
            states.setdefault(engine.pool, []).append(engine.state)
        for pool, config in (self._configs or {}).items():
            has = states.get(pool, [])
            settled = _S.READY in has and PENDING.isdisjoint(has)
            self._histories[pool] = pools.observe(
                self.history(pool), totals.get(pool, NOTHING), slots=config.slots, settled=settled, now=now
            )

    def _place(self, start: Start, now: float) -> Change:
        config = (self._configs or {})[start.pool]
        device = next(device for device in self._devices if device.id == start.device)
        engine = Engine(
            id=self._new_id(),
            pool=start.pool,
            spec=config.spec,
            state=_S.PLACED,
            since=now,
            node=device.node,
            device=device.id,
            memory_bytes=start.memory_bytes,
            epoch=self.epoch,
            created_at=now,
            caused_by=start.caused_by,
        )
        self.engines[engine.id] = engine
        return Change(before=None, after=engine, reason=start.caused_by)

    def _drain(self, engine: Engine, reason: Reason, now: float) -> Change:
        change = self._change(engine, _S.DRAINING, now, reason)
        self.draining[engine.id] = Draining(reason, self._published.version + 1)
        return change

    def _change(
        self, engine: Engine, to: EngineState, now: float, reason: str | None, last_lines: tuple[str, ...] = ()
    ) -> Change:
        after = transition(engine, to, max(now, engine.since))
        self.draining.pop(engine.id, None)
        if to is _S.STOPPED:
            del self.engines[engine.id]
        else:
            self.engines[engine.id] = after
        return Change(before=engine.state, after=after, reason=reason, last_lines=last_lines)
