"""SQL of the tables `model` and `variant`, and what is announced of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import asyncpg
import msgspec
from msgspec import Struct

from engines.commands import CHANNEL as COMMAND_CHANNEL
from engines.commands import Command, encode
from engines.errors import Conflict, NotFound
from engines.model import Model, ModelDigest, RequestDefaults, RuntimeArguments, Scaling, Variant
from engines.queries.database import Connection, Database, as_json

CATALOG_CHANNEL: Final = "greenroom_catalog"
_CATALOG_LOCK: Final = 0x6361_7461_6C6F_67  # "catalog"


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
        as_json(model),
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


async def all_have_any(database: Database, names: Iterable[tuple[str, str]]) -> bool:
    """Would `all_variants` have any of these (workspace, name)? Says only yes or no."""
    workspaces, variants = zip(*names, strict=True)
    found: bool = await database.fetchval(
        """
        SELECT EXISTS (
            SELECT FROM unnest($1::text[], $2::text[]) AS wanted (workspace, name)
            JOIN variant v USING (workspace, name) JOIN workspace w ON w.name = v.workspace
            WHERE w.disabled_at IS NULL
        )
        """,
        workspaces,
        variants,
    )
    return found


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
        as_json(variant.defaults),
        as_json(variant.scaling),
        as_json(variant.arguments),
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
