"""All SQL of `engines`.

Functions take an asyncpg connection or pool (`Database`); each is one statement, so each is atomic by itself. Structs
travel as JSON text cast in SQL, so that it doesn't matter whether a pool has codecs. Times are seconds since the epoch.

What the controller writes is guarded by its epoch: the statement locks the `installation` row for sharing, so a later
controller that raises the epoch waits for it, and from then on the old one's writes touch nothing and raise
`LeadershipLost`.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy
from msgspec import Struct

from engines.commands import CHANNEL as COMMAND_CHANNEL
from engines.commands import Command, encode
from engines.errors import Conflict, LeadershipLost, NotFound
from engines.lifecycle import HOLDS_MEMORY
from engines.model import (
    Demand,
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    Fleet,
    GatewayId,
    Model,
    ModelDigest,
    NodeId,
    PoolId,
    RequestDefaults,
    RuntimeArguments,
    Scaling,
    Variant,
)

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"
Database: TypeAlias = "Connection | asyncpg.Pool[Any]"

FLEET_CHANNEL: Final = "greenroom_fleet"
DEMAND_CHANNEL: Final = "greenroom_demand"
CATALOG_CHANNEL: Final = "greenroom_catalog"

_LEADERSHIP_LOCK: Final = 0x6772_656E_726F_6F6D  # "greenroom"; one controller a database
_CATALOG_LOCK: Final = 0x6361_7461_6C6F_67  # "catalog"

# Installation and leadership -----------------------------------------------------------------------------------------


class Installation(Struct, frozen=True):
    """The database's identity and the epoch of the controller that leads."""

    id: str
    epoch: int


async def installation(database: Database) -> Installation:
    """The installation that `greenroom migrate` made."""
    row = await database.fetchrow("SELECT id, epoch FROM installation")
    if row is None:
        raise LookupError("the database has no installation row; run `greenroom migrate`")
    return Installation(row["id"], row["epoch"])


async def try_leadership(connection: Connection) -> bool:
    """Take the leader's lock for as long as this connection lives; false if another session has it."""
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LEADERSHIP_LOCK))


async def raise_epoch(database: Database) -> int:
    """Begin a new controller's epoch; only the holder of the leader's lock may."""
    epoch = await database.fetchval("UPDATE installation SET epoch = epoch + 1 RETURNING epoch")
    if epoch is None:
        raise LookupError("the database has no installation row; run `greenroom migrate`")
    return int(epoch)


async def ping(database: Database) -> None:
    """Does the connection still answer?"""
    await database.fetchval("SELECT 1")


# Engines and their intervals -----------------------------------------------------------------------------------------

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
        _json(engine.spec),
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


def _json(value: Struct) -> str:
    return msgspec.json.encode(value).decode()


# Fleet and demand, as they go while Valkey is away -------------------------------------------------------------------


async def put_fleet(database: Database, fleet: Fleet) -> bool:
    """Store the fleet unless a newer one is there and notify `FLEET_CHANNEL` with "epoch.version"; was it stored?"""
    stored = await database.fetchval(
        """
        WITH stored AS (
            INSERT INTO fleet_snapshot AS old (epoch, version, body) VALUES ($1, $2, $3::text::jsonb)
            ON CONFLICT (only_one) DO UPDATE
            SET epoch = excluded.epoch, version = excluded.version, body = excluded.body
            WHERE (old.epoch, old.version) < (excluded.epoch, excluded.version)
            RETURNING epoch, version
        )
        SELECT pg_notify($4, epoch || '.' || version)::text IS NOT NULL FROM stored
        """,
        fleet.epoch,
        fleet.version,
        _json(fleet),
        FLEET_CHANNEL,
    )
    return stored is not None


async def fleet(database: Database) -> Fleet | None:
    """The last fleet that was stored; `None` before the first."""
    body = await database.fetchval("SELECT body::text FROM fleet_snapshot")
    return msgspec.json.decode(body, type=Fleet) if body is not None else None


async def put_demand(database: Database, demand: Demand) -> None:
    """Store a gateway's report over its last one and notify `DEMAND_CHANNEL` with the gateway's id."""
    await database.execute(
        """
        WITH stored AS (
            INSERT INTO demand_report AS old (gateway, at, body)
            VALUES ($1::uuid, to_timestamp($2::float8), $3::text::jsonb)
            ON CONFLICT (gateway) DO UPDATE SET at = excluded.at, body = excluded.body
            WHERE old.at <= excluded.at
            RETURNING gateway
        )
        SELECT pg_notify($4, gateway::text) FROM stored
        """,
        demand.gateway,
        demand.at,
        _json(demand),
        DEMAND_CHANNEL,
    )


async def demand(database: Database, gateway: GatewayId) -> Demand | None:
    """A gateway's last stored report."""
    body = await database.fetchval("SELECT body::text FROM demand_report WHERE gateway = $1::uuid", gateway)
    return msgspec.json.decode(body, type=Demand) if body is not None else None


async def demands_since(database: Database, at: float) -> tuple[Demand, ...]:
    """Every gateway's last stored report if it was made at `at` or later."""
    rows = await database.fetch("SELECT body::text FROM demand_report WHERE at >= to_timestamp($1::float8)", at)
    return tuple(msgspec.json.decode(row["body"], type=Demand) for row in rows)


async def remove_demands_before(database: Database, at: float) -> int:
    """Forget reports of gateways that are long gone; how many there were."""
    rows = await database.fetch("DELETE FROM demand_report WHERE at < to_timestamp($1::float8) RETURNING 1", at)
    return len(rows)


# Models --------------------------------------------------------------------------------------------------------------


class ModelRecord(Struct, frozen=True):
    """A model as stored."""

    model: Model
    created_at: float


async def create_model(database: Database, model: Model) -> bool:
    """Store a manifest; false if the name is taken."""
    created = await database.fetchval(
        """
        INSERT INTO model (name, digest, manifest) VALUES ($1, $2, $3::text::jsonb)
        ON CONFLICT (name) DO NOTHING RETURNING 1
        """,
        model.name,
        model.digest,
        _json(model),
    )
    return created is not None


async def model_record(database: Database, name: str) -> ModelRecord | None:
    """The model of that name."""
    row = await database.fetchrow(f"{_MODELS} WHERE name = $1", name)
    return _model_record(row) if row is not None else None


async def model_records(database: Database, *, after: str = "", limit: int = 100) -> tuple[ModelRecord, ...]:
    """Models by name, those that come after a name."""
    rows = await database.fetch(f"{_MODELS} WHERE name > $1 ORDER BY name LIMIT $2", after, limit)
    return tuple(_model_record(row) for row in rows)


async def delete_model(database: Database, name: str) -> ModelDigest:
    """Forget a model and return its digest; `NotFound`, or `Conflict` while a variant names it or an engine runs it."""
    try:
        row = await database.fetchrow(
            """
            WITH engine AS (
                SELECT min(engine.id::text) AS id
                FROM engine JOIN model ON model.digest = engine.spec ->> 'model_digest'
                WHERE model.name = $1 AND engine.state <> 'stopped'
            ),
            deleted AS (
                DELETE FROM model USING engine WHERE name = $1 AND engine.id IS NULL RETURNING digest
            )
            SELECT engine.id, deleted.digest FROM engine LEFT JOIN deleted ON true
            """,
            name,
        )
    except asyncpg.ForeignKeyViolationError:
        raise Conflict(f"model {name} is in use: variants name it; remove them first") from None
    if row is not None and row["id"] is not None:
        raise Conflict(f"model {name} is in use: engine {row['id']} runs it; stop it first")
    if row is None or row["digest"] is None:
        raise NotFound(f"model {name} does not exist")
    return ModelDigest(row["digest"])


async def digest_is_named(database: Database, digest: ModelDigest) -> bool:
    """Does any model have these files?"""
    return bool(await database.fetchval("SELECT EXISTS (SELECT FROM model WHERE digest = $1)", digest))


_MODELS: Final = "SELECT manifest::text, extract(epoch FROM created_at)::float8 AS created_at FROM model"


def _model_record(row: asyncpg.Record) -> ModelRecord:
    return ModelRecord(msgspec.json.decode(row["manifest"], type=Model), row["created_at"])


# Variants ------------------------------------------------------------------------------------------------------------


async def create_variant(database: Database, workspace: str, variant: Variant) -> bool:
    """Store a variant and say so on `CATALOG_CHANNEL`; false if the workspace has one of that name.

    Raises `NotFound` if there is no such workspace or model.
    """
    try:
        created = await database.fetchval(
            """
            WITH created AS (
                INSERT INTO variant (workspace, name, model, defaults, scaling, arguments, dedicated)
                VALUES ($1, $2, $3, $4::text::jsonb, $5::text::jsonb, $6::text::jsonb, $7)
                ON CONFLICT (workspace, name) DO NOTHING RETURNING workspace, name
            )
            SELECT pg_notify($8, workspace || '/' || name)::text IS NOT NULL FROM created
            """,
            workspace,
            *_variant_columns(variant),
            CATALOG_CHANNEL,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise _missing(error, workspace, variant.model.name) from None
    return created is not None


async def update_variant(database: Database, workspace: str, variant: Variant) -> None:
    """Store a variant over the one of that name and say so; `NotFound` if it, or its model, isn't there."""
    try:
        updated = await database.fetchval(
            """
            WITH updated AS (
                UPDATE variant SET model = $3, defaults = $4::text::jsonb, scaling = $5::text::jsonb,
                                   arguments = $6::text::jsonb, dedicated = $7
                WHERE workspace = $1 AND name = $2 RETURNING workspace, name
            )
            SELECT pg_notify($8, workspace || '/' || name)::text IS NOT NULL FROM updated
            """,
            workspace,
            *_variant_columns(variant),
            CATALOG_CHANNEL,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise _missing(error, workspace, variant.model.name) from None
    if updated is None:
        raise NotFound(f"workspace {workspace} has no variant {variant.name}")


async def delete_variant(database: Database, workspace: str, name: str) -> None:
    """Forget a variant and say so; `NotFound` if it isn't there."""
    deleted = await database.fetchval(
        """
        WITH deleted AS (DELETE FROM variant WHERE workspace = $1 AND name = $2 RETURNING workspace, name)
        SELECT pg_notify($3, workspace || '/' || name)::text IS NOT NULL FROM deleted
        """,
        workspace,
        name,
        CATALOG_CHANNEL,
    )
    if deleted is None:
        raise NotFound(f"workspace {workspace} has no variant {name}")


async def variant(database: Database, workspace: str, name: str, *, lock: bool = False) -> Variant | None:
    """A workspace's variant; with `lock` nobody else changes it until the transaction ends."""
    suffix = "FOR UPDATE OF v" if lock else ""
    row = await database.fetchrow(f"{_VARIANTS} WHERE v.workspace = $1 AND v.name = $2 {suffix}", workspace, name)
    return _variant(row) if row is not None else None


async def variants(database: Database, workspace: str, *, after: str = "", limit: int = 100) -> tuple[Variant, ...]:
    """A workspace's variants by name, those that come after a name."""
    rows = await database.fetch(
        f"{_VARIANTS} WHERE v.workspace = $1 AND v.name > $2 ORDER BY v.name LIMIT $3", workspace, after, limit
    )
    return tuple(_variant(row) for row in rows)


async def all_variants(database: Database) -> tuple[Variant, ...]:
    """Every variant of every workspace that isn't disabled. Across workspaces on purpose: pools are shared."""
    rows = await database.fetch(
        f"""
        {_VARIANTS} JOIN workspace w ON w.name = v.workspace
        WHERE w.disabled_at IS NULL ORDER BY v.workspace, v.name
        """
    )
    return tuple(_variant(row) for row in rows)


async def lock_catalog(connection: Connection) -> None:
    """Let nobody else check and then change models or variants until this transaction ends."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _CATALOG_LOCK)


async def notify_catalog(database: Database) -> None:
    """Make every process load its catalog again."""
    await database.execute("SELECT pg_notify($1, '')", CATALOG_CHANNEL)


async def send_command(database: Database, command: Command) -> None:
    """Ask something of the controller that leads, if one does."""
    await database.execute("SELECT pg_notify($1, $2)", COMMAND_CHANNEL, encode(command))


_VARIANTS: Final = """
    SELECT v.workspace, v.name, v.defaults::text, v.scaling::text, v.arguments::text, v.dedicated,
           extract(epoch FROM v.created_at)::float8 AS created_at, m.manifest::text
    FROM variant v JOIN model m ON m.name = v.model
"""


def _variant_columns(variant: Variant) -> tuple[object, ...]:
    return (
        variant.name,
        variant.model.name,
        _json(variant.defaults),
        _json(variant.scaling),
        _json(variant.arguments),
        variant.dedicated,
    )


def _variant(row: asyncpg.Record) -> Variant:
    return Variant(
        workspace=row["workspace"],
        name=row["name"],
        model=msgspec.json.decode(row["manifest"], type=Model),
        defaults=msgspec.json.decode(row["defaults"], type=RequestDefaults),
        scaling=msgspec.json.decode(row["scaling"], type=Scaling),
        arguments=msgspec.json.decode(row["arguments"], type=RuntimeArguments),
        dedicated=row["dedicated"],
        created_at=row["created_at"],
    )


def _missing(error: asyncpg.ForeignKeyViolationError, workspace: str, model: str) -> NotFound:
    if "workspace" in str(error.constraint_name):
        return NotFound(f"workspace {workspace} does not exist")
    return NotFound(f"model {model} does not exist")
