"""`/admin/v1/engines` and `/admin/v1/fleet`: what runs, what ran, and where.

Engines are read from Postgres, where the controller writes each change before anything else hears of it. Stopping is a
wish to the controller: the answer comes before its effect.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated
from uuid import UUID

from litestar import Response, get, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Struct

from app.admin.pages import After, Limit, Page, moment, moment_or_none, page, position
from app.admin.parts import AdminParts, Parts
from app.admin.problems import PROBLEMS, FieldInvalid, NotNow
from engines import placement, queries
from engines.commands import Stop
from engines.errors import NotFound
from engines.logs import LogPart
from engines.model import EngineId, EngineState, PoolStatus, RuntimeArguments
from engines.queries import EngineRecord

Stopped = Annotated[bool, QueryParameter(description="With those that are over.")]
Lines = Annotated[int, QueryParameter(ge=0, le=10_000, description="At most so many of the last lines.")]
Position = Annotated[str | None, QueryParameter(max_length=100, description="`position` of an earlier answer.")]


class EngineView(Struct, frozen=True, kw_only=True):
    """An engine as it is, or was."""

    id: str
    pool: str
    state: EngineState
    since: datetime
    node: str
    device: str
    memory_bytes: int
    slots: int
    model_digest: str
    arguments: RuntimeArguments
    isolation: str
    caused_by: str | None
    created_at: datetime
    ready_at: datetime | None
    start_s: float | None
    """From placing to ready."""
    phases_us: dict[str, int]
    pid: int | None
    failure: str | None
    last_lines: tuple[str, ...]
    """The end of its log if it failed."""


class EngineStop(Struct, frozen=True, forbid_unknown_fields=True):
    """How to stop."""

    force: bool = False
    """Without waiting for its requests to end."""


class EngineLog(Struct, frozen=True):
    """Some of an engine's log, oldest line first."""

    lines: tuple[str, ...]
    position: str
    """Pass it as `?after=` to get what has come since."""


class DeviceView(Struct, frozen=True):
    """A device and what engines have reserved of it, in bytes."""

    id: str
    node: str
    memory_bytes: int
    reserved_bytes: int


class FleetView(Struct, frozen=True):
    """The fleet as this gateway last heard of it."""

    epoch: int
    version: int
    at: datetime
    devices: tuple[DeviceView, ...]
    pools: tuple[PoolStatus, ...]
    engines: dict[EngineState, int]
    """How many are in which state."""


def view(record: EngineRecord) -> EngineView:
    """An engine as the API shows it."""
    engine = record.engine
    return EngineView(
        id=engine.id,
        pool=engine.pool,
        state=engine.state,
        since=moment(engine.since),
        node=engine.node,
        device=engine.device,
        memory_bytes=engine.memory_bytes,
        slots=engine.slots,
        model_digest=engine.spec.model_digest,
        arguments=engine.spec.arguments,
        isolation=engine.spec.isolation,
        caused_by=engine.caused_by,
        created_at=moment(engine.created_at),
        ready_at=moment_or_none(engine.ready_at),
        start_s=None if engine.ready_at is None else engine.ready_at - engine.created_at,
        phases_us=engine.phases_us,
        pid=engine.pid,
        failure=engine.failure,
        last_lines=record.last_lines,
    )


@get("/engines", tags=["engines"], responses=PROBLEMS)
async def list_engines(
    parts: Parts, stopped: Stopped = False, limit: Limit = 100, after: After = None
) -> Page[EngineView]:
    """Engines, newest first."""
    before = position(after)
    if before is not None and not _is_uuid(before):
        raise FieldInvalid("after", "not a cursor of this API")
    id_before = None if before is None else EngineId(before)
    found = await queries.engine_records(parts.pool, stopped=stopped, before=id_before, limit=limit + 1)
    return page(found, limit, lambda record: record.engine.id, view)


@get("/engines/{engine:str}", tags=["engines"], responses=PROBLEMS)
async def get_engine(engine: FromPath[str], parts: Parts) -> EngineView:
    """One engine."""
    return view(await _find(parts, engine))


@post("/engines/{engine:str}/stop", tags=["engines"], responses=PROBLEMS)
async def stop_engine(
    engine: FromPath[str], parts: Parts, data: JSONBody[EngineStop | None] = None
) -> Response[EngineView]:
    """Have it drain and stop, or with `force` stop at once. 202: the controller was asked; 200: it is over already."""
    record = await _find(parts, engine)
    if record.engine.state is EngineState.STOPPED:
        return Response(view(record), status_code=200)
    await queries.send_command(parts.pool, Stop(record.engine.id, force=data is not None and data.force))
    return Response(view(record), status_code=202)


@get("/engines/{engine:str}/logs", tags=["engines"], responses=PROBLEMS)
async def get_logs(engine: FromPath[str], parts: Parts, lines: Lines = 200, after: Position = None) -> EngineLog:
    """The end of its log, or whole lines that have come since `after`."""
    record = await _find(parts, engine)
    if after is not None:
        return _log(await asyncio.to_thread(parts.logs.since, record.engine.id, after))
    part = await asyncio.to_thread(parts.logs.tail, record.engine.id, lines)
    if not part.position:
        return EngineLog(record.last_lines[-lines:] if lines else (), "")
    return _log(part)


@get("/fleet", tags=["engines"], responses=PROBLEMS)
async def get_fleet(parts: Parts) -> FleetView:
    """Devices, what is reserved of them, and the state of each pool."""
    fleet = parts.fleet()
    if fleet is None:
        raise NotNow("no fleet has been published yet; is the controller running?")
    free = placement.free(fleet.devices, fleet.engines)
    counts: dict[EngineState, int] = {}
    for engine in fleet.engines:
        counts[engine.state] = counts.get(engine.state, 0) + 1
    devices = tuple(
        DeviceView(device.id, device.node, device.memory_bytes, device.memory_bytes - free[device.id])
        for device in fleet.devices
    )
    return FleetView(fleet.epoch, fleet.version, moment(fleet.at), devices, fleet.pools, counts)


async def _find(parts: AdminParts, engine: str) -> EngineRecord:
    record = await queries.engine_record(parts.pool, EngineId(engine)) if _is_uuid(engine) else None
    if record is None:
        raise NotFound(f"engine {engine} does not exist")
    return record


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def _log(part: LogPart) -> EngineLog:
    return EngineLog(part.lines, part.position)


ROUTES = [list_engines, get_engine, stop_engine, get_logs, get_fleet]
