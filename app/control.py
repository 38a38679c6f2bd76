"""The control process: waits until it leads, then runs a controller for one epoch until it is told to stop.

Leadership is a lock that lives as long as one Postgres connection. When that connection is lost the process ends with
exit code 1 at once, for another to lead; whatever it still writes is refused by its epoch, and the engines live on.

    SIGTERM   end, engines live on; the next controller adopts them
    SIGINT    drain and stop all engines, then end
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
import structlog

from app.notifications import Notifications
from engines import commands, queries
from engines.catalog import Catalog
from engines.controller import Controller
from engines.errors import LeadershipLost
from engines.fleet import DemandInbox
from engines.launchers.launcher import Launcher

STANDBY_S: Final = 1.0
"""Between two attempts to lead."""
CHECK_S: Final = 1.0
"""Between two looks at the connection that holds the lock."""
ANSWER_S: Final = 2.0
"""Longest wait for an answer on it."""
SWEEP_S: Final = 2.0
"""Between two looks for what dead gateways left in the ledger."""
FORGET_S: Final = 3600.0
"""A gateway's report of that age is removed from Postgres."""

_AWAY: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ControlParts:
    """What `wiring` builds for one epoch; nothing of it runs yet and no callbacks are registered."""

    controller: Controller
    launcher: Launcher
    catalog: Catalog
    notifications: Notifications
    inbox: DemandInbox
    """Its `receive` is the controller's `demand_received`."""
    sweep: Callable[[float], Awaitable[object]]
    """The ledger's reaper."""


async def run_control(dsn: str, build: Callable[[int], ControlParts]) -> int:
    """Lead once it is this process' turn, until a signal or until leadership is lost; the process' exit code.

    `build` makes the parts for an epoch. Raises what asyncpg raises if Postgres can't be reached at all.
    """
    asked: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, _ask, asked, sig)
    connection = await asyncpg.connect(dsn, timeout=ANSWER_S)
    code = 0
    try:
        if await _elected(connection, asked):
            epoch = await queries.raise_epoch(connection)
            await queries.remove_demands_before(connection, time.time() - FORGET_S)
            await _lead(connection, build(epoch), asked)
    except* LeadershipLost as lost:
        log.error("leadership_lost", reason=str(lost.exceptions[0]))
        code = 1
    except* _AWAY as away:
        log.error("postgres_lost", error=type(away.exceptions[0]).__name__)
        code = 1
    finally:
        connection.terminate()
    return code


def _ask(asked: asyncio.Future[signal.Signals], sig: signal.Signals) -> None:
    if not asked.done():
        asked.set_result(sig)


async def _elected(connection: queries.Connection, asked: asyncio.Future[signal.Signals]) -> bool:
    """Wait for the leader's lock; false if a signal came first."""
    standing_by = False
    while not await queries.try_leadership(connection):
        if not standing_by:
            standing_by = True
            log.info("control_stands_by")
        await asyncio.wait({asked}, timeout=STANDBY_S)
        if asked.done():
            return False
    return True


async def _lead(connection: queries.Connection, parts: ControlParts, asked: asyncio.Future[signal.Signals]) -> None:
    _connect(parts)
    try:
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(work)
                for work in (
                    parts.notifications.run(),
                    parts.inbox.run(),
                    parts.catalog.run(),
                    _sweep(parts.sweep),
                    _hold(connection),
                )
            ]
            running: asyncio.Future[Any] = group.create_task(parts.controller.run())
            await parts.catalog.load()
            parts.controller.catalog_changed(parts.catalog.all())
            await asyncio.wait([running, asked], return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                log.info("control_stops", signal=asked.result().name)
                await parts.controller.shutdown(stop_engines=asked.result() is signal.SIGINT)
            await running
            for task in background:
                task.cancel()
    finally:
        await parts.launcher.close()


def _connect(parts: ControlParts) -> None:
    """Have what Postgres says reach those whom it concerns."""
    notifications = parts.notifications

    def listening(up: bool) -> None:
        if up:  # what was said before is lost
            parts.catalog.notified()
            parts.inbox.postgres_notified("")

    notifications.on(queries.CATALOG_CHANNEL, parts.catalog.notified)
    notifications.on(queries.DEMAND_CHANNEL, parts.inbox.postgres_notified)
    notifications.on(commands.CHANNEL, lambda payload: obey(payload, parts.controller, parts.catalog))
    notifications.on_connection(listening)
    parts.catalog.subscribe(parts.controller.catalog_changed)


def obey(payload: str, controller: Controller, catalog: Catalog) -> None:
    """Pass an operator's order on; what isn't one, or names what isn't there, is logged and dropped."""
    match commands.decode(payload):
        case commands.Stop(engine, force):
            controller.stop_engine(engine, force=force)
        case commands.Prewarm(workspace, name):
            variant = catalog.get(workspace, name)
            if variant is None:
                log.warning("prewarm_of_unknown_variant", workspace=workspace, variant=name)
            else:
                controller.prewarm(variant.spec.pool)
        case None:
            log.warning("order_unreadable", length=len(payload))


async def _hold(connection: queries.Connection) -> None:
    """Raise `LeadershipLost` when the connection with the lock no longer answers."""
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            async with asyncio.timeout(ANSWER_S):
                await queries.ping(connection)
        except _AWAY as error:
            raise LeadershipLost(f"the connection with the leader's lock is gone: {type(error).__name__}") from None


async def _sweep(sweep: Callable[[float], Awaitable[Any]]) -> None:
    while True:
        try:
            await sweep(time.time())
        except Exception as error:  # one row that nobody can read is no reason to stop deciding
            log.warning("sweep_failed", error=type(error).__name__, exc_info=not isinstance(error, _AWAY))
        await asyncio.sleep(SWEEP_S)
