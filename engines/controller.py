"""The one writer of engines' states: the loop around `roster` that makes decisions durable and has them carried out.

    reports, variants, orders, launcher's events ─▶ inputs ─▶ roster ─▶ changes ─▶ Postgres ─▶ launcher ─▶ inputs …
                                                                              └──▶ fleet, published

One task applies inputs and decides, so states change one after the other; nothing is done about a change before it is
in Postgres. What takes time (starting, stopping, asking an engine) runs in a task per engine that the controller owns,
never a request, and comes back as an input. A gateway's report or a launcher's event is looked at once; else there is a
round each `tick_s`.

It crashes rather than guess: if Postgres refuses a change (another controller leads, or it is away), `run` raises, the
process ends, and the next controller adopts the engines, which live on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import asyncpg
import structlog
from uuid_utils import uuid7

from engines import queries
from engines.actions import Draining
from engines.errors import LaunchFailed
from engines.launchers.launcher import Launcher
from engines.lifecycle import HAS_PROCESS
from engines.model import Demand, Engine, EngineId, EngineState, Fleet, Model, PoolId, Variant
from engines.plan import Policy
from engines.roster import Change, Roster

LAST_LINES: Final = 50
"""How much of the log of a failed engine is kept."""
ASK_AGAIN: Final = 2
"""How often an engine that gives no answer is asked again before it counts as empty."""
RETRY_S: Final = 1.0
"""Between attempts to stop an engine that the launcher could not stop."""
HAND_OVER_S: Final = 2.0
"""How long a controller that leaves waits for forks under way, so that their processes are known to the next one."""

_PUBLISH_FAILED: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

Input = Callable[[float], tuple[Change, ...] | None]


class Settings(Policy, Protocol):
    """What the controller needs of an operator's settings."""

    @property
    def tick_s(self) -> float:
        """Longest time between two rounds."""

    @property
    def stop_grace_s(self) -> float:
        """Between SIGTERM and SIGKILL of an engine."""


class Controller:
    """Decides which engines exist, for one epoch. `database` and `launcher` stay the caller's.

    `publish` sends a fleet to the gateways; if it raises because a store is away it is called again next round.
    `in_flight` asks an engine how many requests it has; `None`: no answer.
    """

    def __init__(
        self,
        *,
        database: asyncpg.Pool[Any],
        launcher: Launcher,
        publish: Callable[[Fleet], Awaitable[None]],
        in_flight: Callable[[Engine], Awaitable[int | None]],
        settings: Settings,
        epoch: int,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], EngineId] = lambda: EngineId(str(uuid7())),
    ) -> None:
        self._database = database
        self._launcher = launcher
        self._send = publish
        self._in_flight = in_flight
        self._settings = settings
        self._epoch = epoch
        self._clock = clock
        self._new_id = new_id
        self._log = structlog.get_logger().bind(epoch=epoch)
        self._roster: Roster
        self._inputs: deque[Input] = deque()
        self._woken = asyncio.Event()
        self._unsent: Fleet | None = None
        self._last = 0.0
        self._leaving = False
        self._stop_by: float | None = None
        self._ended = asyncio.Event()
        self._group: asyncio.TaskGroup
        self._tasks: set[asyncio.Task[None]] = set()
        self._starts: set[asyncio.Task[None]] = set()
        self._stopping: set[EngineId] = set()
        self._asking: set[EngineId] = set()

    # Inputs: plain calls on the event loop, at any time, also before `run` --------------------------------------------

    def demand_received(self, demand: Demand) -> None:
        """A gateway has reported."""
        self._put(lambda now: self._roster.demand_received(demand, now))

    def catalog_changed(self, variants: Sequence[Variant]) -> None:
        """These are all the variants; nothing is decided before the first call."""
        self._put(lambda _: self._roster.catalog_changed(variants))

    def stop_engine(self, engine: EngineId, *, force: bool = False) -> None:
        """An operator's order: drain an engine and stop it, or with `force` stop it whatever it has in flight."""
        self._log.info("stop_ordered", engine=engine, force=force)
        self._put(lambda now: self._roster.stop(engine, now, force=force))

    def prewarm(self, pool: PoolId) -> None:
        """An operator's order: have an engine of this pool ready. Counts as use."""

        def wanted(now: float) -> None:
            self._log.info("prewarm_ordered", pool=pool, known=self._roster.prewarm(pool, now))

        self._put(wanted)

    async def shutdown(self, *, stop_engines: bool, drain_s: float = 10.0) -> None:
        """Have `run` return, and wait for it: with the engines living on for the next controller, or without any left.

        With `stop_engines` nothing starts any more and all engines drain, for at most `drain_s`; then they are stopped.
        """
        if stop_engines:
            self._stop_by = self._now() + drain_s
            self._put(lambda _: self._roster.close())
        else:
            self._leaving = True
            self._woken.set()
        await self._ended.wait()

    def _put(self, entry: Input) -> None:
        self._inputs.append(entry)
        self._woken.set()

    # The loop ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Adopt what is there and decide until `shutdown`.

        Raises `LeadershipLost`, or what asyncpg raises, when Postgres doesn't take what was decided.
        """
        try:
            async with asyncio.TaskGroup() as self._group:
                self._in_background(self._watch())
                await self._take_over()
                while await self._round():
                    await self._wait()
                for task in self._tasks:
                    task.cancel()
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        finally:
            self._ended.set()

    async def _take_over(self) -> None:
        """Adopt the engines that an earlier controller left."""
        found = await queries.live_engines(self._database)
        alive = await self._launcher.adopt([engine for engine in found if engine.state in HAS_PROCESS])
        now = self._now()
        self._roster = Roster(
            epoch=self._epoch,
            since=now,
            policy=self._settings,
            devices=await self._launcher.devices(),
            new_id=self._new_id,
            start_times=await queries.start_times(self._database),
        )
        self._log.info("controller_leads", engines=len(found), alive=len(alive))
        changes = self._roster.adopt(
            found, alive, now, last_lines=lambda engine: self._launcher.log_tail(engine, LAST_LINES)
        )
        await self._make(changes)
        for engine in self._roster.engines.values():
            self._stop_if_over(engine)

    async def _round(self) -> bool:
        """Apply what came in, decide, publish; false if there is nothing more to do, ever."""
        await self._apply_inputs()
        if self._leaving:
            await self._hand_over()
            return False
        now = self._now()
        if self._stop_by is not None and now >= self._stop_by:
            await self._make(self._roster.stop_all(now))
        decisions = self._roster.decide(now)
        await self._make(decisions.changes)
        for engine, draining in decisions.probes:
            self._ask(engine, draining)
        await self._publish()
        return not self._roster.closing or bool(self._roster.engines)

    async def _apply_inputs(self) -> None:
        self._woken.clear()
        while self._inputs:
            await self._make(self._inputs.popleft()(self._now()) or ())

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.tick_s):
                await self._woken.wait()

    async def _hand_over(self) -> None:
        """Let forks under way end, so that the next controller finds their processes in the database."""
        if self._starts:
            await asyncio.wait(self._starts, timeout=HAND_OVER_S)
            await self._apply_inputs()
        await self._publish()

    async def _publish(self) -> None:
        fleet = self._roster.fleet(self._now()) or self._unsent
        if fleet is None:
            return
        self._unsent = fleet
        try:
            await self._send(fleet)
        except _PUBLISH_FAILED as error:
            self._log.warning("fleet_not_published", version=fleet.version, error=type(error).__name__)
        else:
            self._unsent = None

    def _now(self) -> float:
        """The clock, but never back."""
        self._last = max(self._last, self._clock())
        return self._last

    # Making changes true ----------------------------------------------------------------------------------------------

    async def _make(self, changes: Sequence[Change]) -> None:
        """Make changes durable in order, and have what follows from each done."""
        for change in changes:
            if change.before is None:
                await queries.place_engine(self._database, change.after)
            else:
                await queries.change_engine(
                    self._database, change.before, change.after, epoch=self._epoch, last_lines=change.last_lines
                )
            self._tell(change)
            if change.after.state is EngineState.PLACED:
                self._start(change.after)
            else:
                self._stop_if_over(change.after)

    def _tell(self, change: Change) -> None:
        engine = change.after
        tell = self._log.warning if engine.state is EngineState.FAILED else self._log.info
        tell(
            f"engine_{engine.state}",
            engine=engine.id,
            pool=engine.pool,
            was=change.before,
            reason=change.reason,
            device=engine.device,
            memory_bytes=engine.memory_bytes,
            pid=engine.pid,
            age_s=round(engine.since - engine.created_at, 3),
        )

    def _start(self, engine: Engine) -> None:
        config = self._roster.config(engine.pool)
        if config is None:
            raise RuntimeError(f"engine {engine.id} was placed for pool {engine.pool}, which no variant names")
        task = self._in_background(self._started(engine, config.model))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    async def _started(self, engine: Engine, model: Model) -> None:
        try:
            process = await self._launcher.start(engine, model)
        except LaunchFailed as error:
            reason, lines = str(error), error.last_lines
        except Exception as error:
            self._log.exception("start_broke", engine=engine.id)
            reason, lines = f"the launcher broke: {type(error).__name__}", ()
        else:
            self._put(lambda now: self._roster.started(engine.id, process, now))
            return
        self._put(lambda now: self._roster.start_failed(engine.id, reason, now, last_lines=lines))

    def _stop_if_over(self, engine: Engine) -> None:
        if engine.state in {EngineState.STOPPING, EngineState.FAILED} and engine.id not in self._stopping:
            self._stopping.add(engine.id)
            self._in_background(self._stopped(engine))

    async def _stopped(self, engine: Engine) -> None:
        while True:
            try:
                await self._launcher.stop(engine, grace_s=self._settings.stop_grace_s)
                break
            except Exception:
                self._log.exception("stop_broke", engine=engine.id)
                await asyncio.sleep(RETRY_S)
        self._stopping.discard(engine.id)
        self._put(lambda now: self._roster.stopped(engine.id, now))

    def _ask(self, engine: Engine, draining: Draining) -> None:
        if engine.id not in self._asking:
            self._asking.add(engine.id)
            self._in_background(self._asked(engine, draining))

    async def _asked(self, engine: Engine, draining: Draining) -> None:
        try:
            count = await self._in_flight(engine)
            for _ in range(ASK_AGAIN):  # a busy engine may be slow to answer; a dead one is noticed by its launcher
                count = await self._in_flight(engine) if count is None else count
        finally:
            self._asking.discard(engine.id)
        if count:
            self._log.debug("engine_not_empty", engine=engine.id, in_flight=count)
            return
        self._put(lambda _: self._roster.probed(engine.id, draining, count))

    async def _watch(self) -> None:
        async for event in self._launcher.events():
            self._put(lambda now, event=event: self._roster.event(event, now))  # type: ignore[misc]

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
