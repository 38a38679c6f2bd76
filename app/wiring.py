"""The one place that builds objects: a gateway's process and the control process, from the settings."""

from __future__ import annotations

import asyncio
import functools
import platform
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import asyncpg
import structlog
import uvloop
from litestar import Litestar
from litestar.exceptions import HTTPException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from redis.asyncio import Redis
from uuid_utils import uuid7

from app import control, health, pepper
from app.admin import problems
from app.admin.parts import AdminParts
from app.admin.routes import COMPONENTS, admin_routes
from app.control import ControlParts
from app.drain import Drain
from app.metrics import Metrics
from app.notifications import Notifications
from app.openai.routes import tenant_app
from app.parts import GatewayParts
from app.refusal import Refused
from app.server import listen, serve
from app.settings import Settings
from app.telemetry import Telemetry, configure_logging
from engines import queries, scrape, valkey
from engines.admission import Admission
from engines.books import BookShelf
from engines.catalog import Catalog
from engines.client import EngineClient
from engines.controller import Controller
from engines.fleet import DemandInbox, DemandReporter, FleetPublisher, FleetView
from engines.launchers.launcher import Launcher
from engines.launchers.local import LocalLauncher
from engines.launchers.memory import MemoryLauncher, MemoryNode
from engines.logs import EngineLogs
from engines.model import HOST_MEMORY, Device, DeviceId, Engine, GatewayId, NodeId
from tenants.auth import Authenticator
from tenants.ledger import Ledger
from tenants.queries import KEYS_CHANNEL
from tenants.reaper import Reaper
from tenants.usage import BookTotals, RequestId, Tokens

_CONNECTIONS: Final = 8
_LEDGER_LEAVE_S: Final = 5.0
_SCRIPTED_BYTES: Final = 8 << 30
"""Memory of the scripted launcher's device, which holds nothing."""
_DATABASE_AWAY: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

log = structlog.get_logger()


def run_gateway(settings: Settings, *, fd: int | None, index: int) -> None:
    """Run a gateway until it has drained. `fd`: an inherited listening socket for tenants instead of the port."""
    configure_logging(settings.log_level)
    uvloop.run(_gateway(settings, fd, index))


def run_control(settings: Settings) -> None:
    """Run the control process until a signal, or until it no longer leads; ends the process with its exit code."""
    configure_logging(settings.log_level)
    raise SystemExit(uvloop.run(_control(settings)))


# Both processes ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _stores(settings: Settings) -> AsyncIterator[tuple[asyncpg.Pool[Any], Redis, str]]:
    """A pool on Postgres, a client of Valkey and the installation's id; `Refused` if Postgres can't be used."""
    try:
        pool = await asyncpg.create_pool(
            settings.effective_database_url, min_size=1, max_size=_CONNECTIONS, timeout=5.0, command_timeout=30.0
        )
    except _DATABASE_AWAY as error:
        raise Refused(f"can't use the database: {error}") from None
    redis = valkey.client(settings.effective_redis_url)
    try:
        yield pool, redis, (await queries.installation(pool)).id
    except LookupError as error:
        raise Refused(str(error)) from None
    finally:
        await redis.aclose()
        pool.terminate()


# A gateway -----------------------------------------------------------------------------------------------------------


async def _gateway(settings: Settings, fd: int | None, index: int) -> None:
    gateway = settings.gateway
    tenants = socket.socket(fileno=fd) if fd is not None else listen(gateway.host, gateway.port)
    operators = listen(gateway.operator_host, gateway.operator_port + index if gateway.operator_port else 0)
    async with _stores(settings) as (pool, redis, installation):
        view = FleetView(pool, redis, installation)
        parts, reporter = _gateway_parts(settings, pool, redis, installation)
        view.subscribe(parts.admission.fleet_changed)
        view.subscribe(parts.client.fleet_changed)
        notifications = _listening(settings, parts, view)
        apps = [(tenant_app(parts), tenants), (_operator_app(settings, parts, pool, view), operators)]
        async with AsyncExitStack() as stack:
            stack.callback(parts.telemetry.close)
            stack.push_async_callback(parts.client.close)
            background = await stack.enter_async_context(_background())
            await parts.catalog.load()
            for work in (notifications.run(), view.run(), parts.catalog.run(), parts.ledger.run()):
                background(work)
            reporting = background(reporter.run())
            await serve(apps, parts.drain, alone=fd is None or gateway.count == 1)
            reporting.cancel()
            await asyncio.wait({reporting})
            await reporter.leave()
            left = await parts.ledger.drain(_LEDGER_LEAVE_S)
            log.info("gateway_left", gateway=parts.gateway, unsettled=left)


def _gateway_parts(
    settings: Settings, pool: asyncpg.Pool[Any], redis: Redis, installation: str
) -> tuple[GatewayParts, DemandReporter]:
    gateway = GatewayId(str(uuid7()))
    client = EngineClient(silence_s=settings.gateway.engine_read_s)
    reporter = DemandReporter(pool, redis, installation, lambda: admission.collect())  # noqa: PLW0108 (made below)
    admission = Admission(
        gateway,
        queue_length=settings.gateway.queue_length,
        poke=reporter.poke,
        healthy=client.healthy,
        clock=time.time,
    )
    drain = Drain(settings.gateway.drain_s)
    drain.on_begin(admission.close)
    ledger = Ledger(pool, gateway)
    metrics = Metrics()
    metrics.watch(
        running=admission.running,
        waiting=admission.waiting,
        backlog=lambda: ledger.backlog,
        dropped=lambda: ledger.dropped,
    )
    parts = GatewayParts(
        gateway=gateway,
        settings=settings.gateway,
        authenticator=Authenticator(pool, pepper.load(settings)),
        catalog=Catalog(pool),
        admission=admission,
        client=client,
        ledger=ledger,
        drain=drain,
        telemetry=Telemetry("greenroom-gateway", gateway, settings.otlp_endpoint),
        metrics=metrics,
        clock=time.time,
    )
    return parts, reporter


def _listening(settings: Settings, parts: GatewayParts, view: FleetView) -> Notifications:
    """Have what Postgres says reach those whom it concerns."""
    notifications = Notifications(settings.effective_database_url)

    def connection(up: bool) -> None:
        parts.authenticator.channel_changed(up, time.time())
        if up:  # what was said before is lost
            parts.catalog.notified()
            view.postgres_notified("")

    notifications.on(KEYS_CHANNEL, parts.authenticator.invalidate)
    notifications.on(queries.CATALOG_CHANNEL, parts.catalog.notified)
    notifications.on(queries.FLEET_CHANNEL, view.postgres_notified)
    notifications.on_connection(connection)
    return notifications


def _operator_app(settings: Settings, parts: GatewayParts, pool: asyncpg.Pool[Any], view: FleetView) -> Litestar:
    """The operators' side of a gateway."""
    admin = AdminParts(
        pool=pool,
        authenticator=parts.authenticator,
        pepper=pepper.load(settings),
        fleet=lambda: view.current,
        max_engines_per_pool=settings.controller.max_engines_per_pool,
        models_path=settings.models_path,
        logs=EngineLogs(settings.engines_path),
    )
    return Litestar(
        route_handlers=[admin_routes(admin), *health.routes(parts), health.metrics_route(parts)],
        exception_handlers={HTTPException: problems.answer, Exception: problems.answer},
        openapi_config=OpenAPIConfig(
            title="Greenroom",
            version="1",
            components=COMPONENTS,
            use_handler_docstrings=True,
            render_plugins=[JsonRenderPlugin()],
        ),
        logging_config=None,
    )


@asynccontextmanager
async def _background() -> AsyncIterator[Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]]:
    """Tasks for as long as the block lasts; one that breaks is logged and ends the process by breaking the block."""
    owner = asyncio.current_task()
    tasks: set[asyncio.Task[None]] = set()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and owner is not None:
            log.error("task_broke", task=str(task.get_coro()), exc_info=error)
            owner.cancel()

    def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        tasks.add(task)
        return task

    try:
        yield begin
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# The control process -------------------------------------------------------------------------------------------------


async def _control(settings: Settings) -> int:
    async with _stores(settings) as (pool, redis, installation):
        build = functools.partial(_control_parts, settings, pool, redis, installation)
        return await control.run_control(settings.effective_database_url, build)


def _control_parts(
    settings: Settings, pool: asyncpg.Pool[Any], redis: Redis, installation: str, epoch: int
) -> ControlParts:
    launcher = _launcher(settings, installation, epoch)
    shelf = BookShelf(settings.engines_path)

    async def find(request_id: RequestId, attempt: int, since: float) -> BookTotals | None:
        entry = await asyncio.to_thread(shelf.find, str(request_id), attempt, since)
        if entry is None:
            return None
        tokens = Tokens(prompt=entry.prompt, cached=entry.cached, completion=entry.completion)
        return BookTotals(tokens=tokens, lines=entry.lines, engine=entry.engine, finished_at=entry.finished_at)

    controller = Controller(
        database=pool,
        launcher=launcher,
        publish=FleetPublisher(pool, redis, installation).publish,
        in_flight=_in_flight,
        settings=settings.controller,
        epoch=epoch,
    )
    return ControlParts(
        controller=controller,
        launcher=launcher,
        catalog=Catalog(pool),
        notifications=Notifications(settings.effective_database_url),
        inbox=DemandInbox(pool, redis, installation, controller.demand_received),
        sweep=Reaper(pool, find).sweep,
    )


def _launcher(settings: Settings, installation: str, epoch: int) -> Launcher:
    node, memory = NodeId(platform.node() or "node"), settings.controller.memory_bytes
    if settings.engine.launcher == "memory":
        device = Device(id=DeviceId(f"{node}/{HOST_MEMORY}"), node=node, memory_bytes=memory or _SCRIPTED_BYTES)
        return MemoryLauncher(MemoryNode((device,)))
    return LocalLauncher(
        host_socket=settings.host_socket,
        engines_path=settings.engines_path,
        run_path=settings.run_path,
        models_path=settings.models_path,
        installation=installation,
        node=node,
        memory_bytes=memory,
        epoch=epoch,
        start_silence_s=settings.controller.start_silence_s,
        log_bytes=settings.engine.log_bytes,
    )


async def _in_flight(engine: Engine) -> int | None:
    return await scrape.in_flight(engine.address) if engine.address else None
