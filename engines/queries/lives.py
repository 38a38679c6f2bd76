"""SQL of the tables `engine` and `engine_interval`: the lives of engines."""

from __future__ import annotations

from typing import Final

import asyncpg
import msgspec
from msgspec import Struct

from engines.errors import LeadershipLost
from engines.lifecycle import HOLDS_MEMORY
from engines.model import DeviceId, Engine, EngineId, EngineSpec, EngineState, NodeId, PoolId
from engines.queries.database import Database, as_json

_ENGINE_COLUMNS: Final = """
    id::text, pool, spec::text, state, extract(epoch FROM since)::float8 AS since, node, device, memory_bytes, epoch,
    address, pid, pid_start, caused_by, extract(epoch FROM created_at)::float8 AS created_at,
    extract(epoch FROM ready_at)::float8 AS ready_at, phases_us::text, failure, last_lines
"""


class EngineRecord(Struct, frozen=True):
    """An engine as stored, with the end of its log if it failed."""

    engine: Engine
    last_lines: tuple[str, ...]


async def place_engine(database: Database, engine: Engine) -> None:
    """Write a placed engine and its first interval; `LeadershipLost` if `engine.epoch` no longer leads."""
    placed = await database.fetchval(
        """
        WITH leader AS (SELECT FROM installation WHERE epoch = $1 FOR SHARE),
        placed AS (
            INSERT INTO engine (epoch, id, pool, spec, state, since, node, device, memory_bytes, caused_by, created_at)
            SELECT $1::bigint, $2::uuid, $3::text, $4::text::jsonb, $5::text, to_timestamp($6::float8),
                   $7::text, $8::text, $9::bigint, $10::text, to_timestamp($11::float8)
            FROM leader
            RETURNING id, state, since, memory_bytes
        )
        INSERT INTO engine_interval (engine, seq, state, started_at, memory_bytes)
        SELECT id, 0, state, since, memory_bytes FROM placed
        RETURNING 1
        """,
        engine.epoch,
        engine.id,
        engine.pool,
        as_json(engine.spec),
        engine.state,
        engine.since,
        engine.node,
        engine.device,
        engine.memory_bytes,
        engine.caused_by,
        engine.created_at,
    )
    if placed is None:
        raise LeadershipLost(f"epoch {engine.epoch} no longer leads; engine {engine.id} was not placed")


async def change_engine(
    database: Database, before: EngineState, after: Engine, *, epoch: int, last_lines: tuple[str, ...] = ()
) -> None:
    """Write an engine's new state, end the interval of the old one at `after.since` and begin the next.

    The last interval, STOPPED, has no length. Raises `LeadershipLost` if `epoch` no longer leads or the engine isn't in
    state `before`: then someone else has written.
    """
    changed = await database.fetchval(
        """
        WITH leader AS (SELECT FROM installation WHERE epoch = $1 FOR SHARE),
        changed AS (
            UPDATE engine
            SET state = $4, since = to_timestamp($5::float8), address = $6, pid = $7, pid_start = $8,
                ready_at = to_timestamp($9::float8), phases_us = $10::text::jsonb, failure = $11,
                last_lines = CASE WHEN cardinality($12::text[]) > 0 THEN $12::text[] ELSE last_lines END
            FROM leader
            WHERE id = $2::uuid AND state = $3
            RETURNING id, state, since
        ),
        ended AS (
            UPDATE engine_interval SET ended_at = changed.since
            FROM changed
            WHERE engine = changed.id AND ended_at IS NULL
            RETURNING engine, seq
        )
        INSERT INTO engine_interval (engine, seq, state, started_at, ended_at, memory_bytes)
        SELECT id, ended.seq + 1, state, since, CASE WHEN state = 'stopped' THEN since END, $13::bigint
        FROM changed JOIN ended ON ended.engine = changed.id
        RETURNING 1
        """,
        epoch,
        after.id,
        before,
        after.state,
        after.since,
        after.address,
        after.pid,
        after.pid_start,
        after.ready_at,
        msgspec.json.encode(after.phases_us).decode(),
        after.failure,
        list(last_lines),
        after.memory_bytes if after.state in HOLDS_MEMORY else 0,
    )
    if changed is None:
        raise LeadershipLost(
            f"engine {after.id} did not go from {before} to {after.state}: epoch {epoch} no longer leads, "
            "or another controller has changed it"
        )


async def live_engines(database: Database) -> tuple[Engine, ...]:
    """Every engine that isn't over, oldest first."""
    rows = await database.fetch(f"SELECT {_ENGINE_COLUMNS} FROM engine WHERE state <> 'stopped' ORDER BY id")  # noqa: S608
    return tuple(_engine(row) for row in rows)


async def engine_record(database: Database, engine: EngineId) -> EngineRecord | None:
    """One engine, over or not; `None` if there never was one or the id isn't one."""
    try:
        row = await database.fetchrow(f"SELECT {_ENGINE_COLUMNS} FROM engine WHERE id = $1::uuid", engine)  # noqa: S608
    except asyncpg.DataError:
        return None
    return _record(row) if row is not None else None


async def engine_records(
    database: Database, *, stopped: bool = False, before: EngineId | None = None, limit: int = 100
) -> tuple[EngineRecord, ...]:
    """Engines, newest first, those that are over only if `stopped`; the next page begins `before` the last one's id."""
    rows = await database.fetch(
        f"""
        SELECT {_ENGINE_COLUMNS} FROM engine
        WHERE ($1 OR state <> 'stopped') AND ($2::uuid IS NULL OR id < $2::uuid)
        ORDER BY id DESC LIMIT $3
        """,  # noqa: S608
        stopped,
        before,
        limit,
    )
    return tuple(_record(row) for row in rows)


async def start_times(database: Database) -> dict[PoolId, float]:
    """How long the last successful start of each pool took, from placing to ready, in seconds."""
    rows = await database.fetch(
        """
        SELECT DISTINCT ON (pool) pool, extract(epoch FROM ready_at - created_at)::float8 AS start_s
        FROM engine WHERE ready_at IS NOT NULL
        ORDER BY pool, ready_at DESC
        """
    )
    return {PoolId(row["pool"]): row["start_s"] for row in rows}


class Interval(Struct, frozen=True):
    """One stay of an engine in a state."""

    engine: EngineId
    seq: int
    state: EngineState
    started_at: float
    ended_at: float | None
    memory_bytes: int
    """Reserved on the device meanwhile."""


async def engine_intervals(database: Database, engine: EngineId) -> tuple[Interval, ...]:
    """An engine's intervals in order."""
    rows = await database.fetch(
        """
        SELECT engine::text, seq, state, extract(epoch FROM started_at)::float8 AS started_at,
               extract(epoch FROM ended_at)::float8 AS ended_at, memory_bytes
        FROM engine_interval WHERE engine = $1::uuid ORDER BY seq
        """,
        engine,
    )
    return tuple(msgspec.convert(dict(row), Interval) for row in rows)


def _engine(row: asyncpg.Record) -> Engine:
    return Engine(
        id=EngineId(row["id"]),
        pool=PoolId(row["pool"]),
        spec=msgspec.json.decode(row["spec"], type=EngineSpec),
        state=EngineState(row["state"]),
        since=row["since"],
        node=NodeId(row["node"]),
        device=DeviceId(row["device"]),
        memory_bytes=row["memory_bytes"],
        epoch=row["epoch"],
        created_at=row["created_at"],
        address=row["address"],
        pid=row["pid"],
        pid_start=row["pid_start"],
        caused_by=row["caused_by"],
        ready_at=row["ready_at"],
        phases_us=msgspec.json.decode(row["phases_us"], type=dict[str, int]),
        failure=row["failure"],
    )


def _record(row: asyncpg.Record) -> EngineRecord:
    return EngineRecord(_engine(row), tuple(row["last_lines"]))
