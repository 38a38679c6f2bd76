"""Brings a database to this version's schema: numbered `.sql` files, each applied once, in order, never edited.

Each file runs in a transaction of its own, together with the row that records its checksum. An advisory lock lets
several processes migrate at once. A database that has tables but isn't ours is refused, and nothing in it is touched.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from msgspec import Struct

from app import pepper
from app.refusal import Refused
from app.settings import Settings
from tenants import keys
from tenants.queries import create_key, list_keys

DIRECTORY: Final = Path(__file__).parent / "migrations"
CONNECT_S: Final = 10.0
LOCK: Final = 0x6772_656E  # "gren"
_FILE = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")


class MigrationRefused(Refused):
    """The database can't be migrated; nothing was touched. The message is one line."""


class Migration(Struct, frozen=True):
    """One numbered file."""

    name: str
    checksum: str
    sql: str


class Migrated(Struct, frozen=True):
    """What `migrate` found or made."""

    installation: str
    """8 hex digits that name this database's installation."""
    applied: tuple[str, ...]
    """Files applied now; empty if the database was up to date."""
    admin_key: str | None
    """The first operator's key, if it was made now; also in `<data_dir>/admin-key`."""


async def migrate(settings: Settings) -> Migrated:
    """Make pepper, database (embedded only), schema, installation and first admin key, whatever of these is missing.

    Raises `MigrationRefused` or `PepperMissing`.
    """
    url = settings.effective_database_url
    try:
        if not settings.database_url:
            await _create_database(url)
        connection = await asyncpg.connect(url, timeout=CONNECT_S)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.ClientConfigurationError) as error:
        where = "GREENROOM_DATABASE_URL" if settings.database_url else "the embedded Postgres (run `greenroom up`)"
        raise MigrationRefused(f"can't connect to {where}: {str(error) or type(error).__name__}") from None
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
        applied = await apply(connection, read_migrations(DIRECTORY))
        installation = await _installation(connection)
        admin_key = await _first_admin_key(connection, settings)
    finally:
        await connection.close()
    return Migrated(installation, applied, admin_key)


def read_migrations(directory: Path) -> tuple[Migration, ...]:
    """The files of a directory in order. Raises `MigrationRefused` on a gap or a strange name."""
    migrations = []
    for number, path in enumerate(sorted(directory.glob("*.sql")), start=1):
        match = _FILE.match(path.name)
        if match is None or int(match[1]) != number:
            raise MigrationRefused(f"{path.name} is not the migration number {number:04}")
        sql = path.read_text()
        migrations.append(Migration(path.stem, hashlib.sha256(sql.encode()).hexdigest(), sql))
    return tuple(migrations)


async def apply(connection: asyncpg.Connection[Any], migrations: Sequence[Migration]) -> tuple[str, ...]:
    """Apply what is missing and return its names. The caller holds the lock. Raises `MigrationRefused`."""
    done = await _recorded(connection)
    if len(done) > len(migrations):
        raise MigrationRefused(f"the database is of a newer Greenroom: it has {done[-1][0]}, unknown here")
    for (name, checksum), migration in zip(done, migrations, strict=False):
        if name != migration.name or checksum != migration.checksum:
            raise MigrationRefused(f"migration {name} was applied with other contents than {migration.name} has now")
    for migration in migrations[len(done) :]:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO greenroom_migration (name, checksum) VALUES ($1, $2)", migration.name, migration.checksum
            )
    return tuple(m.name for m in migrations[len(done) :])


async def _recorded(connection: asyncpg.Connection[Any]) -> list[tuple[str, str]]:
    """(name, checksum) of what was applied; makes the table for it in an empty database."""
    if await connection.fetchval("SELECT to_regclass('greenroom_migration') IS NULL"):
        foreign = await connection.fetchval(
            """SELECT string_agg(format('%s.%s', n.nspname, c.relname), ', ' ORDER BY c.oid)
                 FROM (SELECT * FROM pg_class c WHERE c.relkind IN ('r', 'p', 'f')
                        AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')) c
                 JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname NOT IN ('information_schema') AND n.nspname NOT LIKE 'pg\\_%'"""
        )
        if foreign:
            shown = foreign if len(foreign) < 80 else foreign[:77] + "..."
            raise MigrationRefused(f"the database has tables but isn't Greenroom's ({shown}): give it an empty one")
        await connection.execute(
            """CREATE TABLE greenroom_migration (
                   name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"""
        )
    rows = await connection.fetch("SELECT name, checksum FROM greenroom_migration ORDER BY name")
    return [(row["name"], row["checksum"]) for row in rows]


async def _installation(connection: asyncpg.Connection[Any]) -> str:
    await connection.execute("INSERT INTO installation (id) VALUES ($1) ON CONFLICT DO NOTHING", secrets.token_hex(4))
    return str(await connection.fetchval("SELECT id FROM installation"))


async def _create_database(url: str) -> None:
    """Make the embedded server's database if it isn't there."""
    parts = urlsplit(url)
    name = parts.path.removeprefix("/")
    connection = await asyncpg.connect(urlunsplit(parts._replace(path="/postgres")), timeout=CONNECT_S)
    try:
        if not await connection.fetchval("SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)", name):
            await connection.execute(f'CREATE DATABASE "{name}"')
    except asyncpg.DuplicateDatabaseError:
        pass
    finally:
        await connection.close()


async def _first_admin_key(connection: asyncpg.Connection[Any], settings: Settings) -> str | None:
    """Make pepper and first operator's key, unless there are any; the key's file is there before the key is valid."""
    if await list_keys(connection, None, limit=1):
        pepper.load(settings)  # its loss makes every key worthless: say so now, and don't make another
        return None
    secret = pepper.create(settings)
    key = keys.generate(keys.KeyKind.OPERATOR, secrets.token_bytes(keys.RANDOM_BYTES))
    pepper.write_private(settings.data_path / "admin-key", key.text + "\n")
    await create_key(connection, None, key.id, keys.digest(secret, key), label="first admin key")
    return key.text
