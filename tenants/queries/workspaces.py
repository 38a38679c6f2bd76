"""SQL of the table `workspace`."""

from __future__ import annotations

from typing import Any, Final

import asyncpg
import msgspec
from asyncpg import Record

from tenants.errors import Conflict, NameInvalid, NotFound
from tenants.model import Name, Workspace, WorkspaceName
from tenants.queries.database import Database

_COLUMNS: Final = """
    name, extract(epoch FROM created_at)::float8 AS created_at, extract(epoch FROM disabled_at)::float8 AS disabled_at
"""


async def create_workspace(database: Database, workspace: str) -> Workspace:
    """Make a workspace. Raises `NameInvalid`; `Conflict` if the name is taken, by a disabled one too."""
    try:
        msgspec.convert(workspace, Name)
    except msgspec.ValidationError:
        raise NameInvalid(
            "a workspace's name has 1 to 64 characters of a-z, 0-9, `.`, `_`, `-`, "
            "and begins and ends with a letter or digit"
        ) from None
    try:
        row = await database.fetchrow(f"INSERT INTO workspace (name) VALUES ($1) RETURNING {_COLUMNS}", workspace)  # noqa: S608
    except asyncpg.UniqueViolationError:
        raise Conflict(f"workspace {workspace} exists already") from None
    return _workspace(_one(row, workspace))


async def get_workspace(database: Database, workspace: str) -> Workspace:
    """One workspace. Raises `NotFound`."""
    row = await database.fetchrow(f"SELECT {_COLUMNS} FROM workspace WHERE name = $1", workspace)  # noqa: S608
    return _workspace(_one(row, workspace))


async def all_workspaces(
    database: Database, *, after: str | None = None, limit: int = 100
) -> tuple[Workspace, ...]:  # cross-tenant: the operators' list
    """At most `limit` workspaces by name, from the one behind `after` on."""
    rows = await database.fetch(
        f"""SELECT {_COLUMNS} FROM workspace WHERE $1::text IS NULL OR name COLLATE "C" > $1
             ORDER BY name COLLATE "C" LIMIT $2""",  # noqa: S608
        after,
        limit,
    )
    return tuple(_workspace(row) for row in rows)


async def disable_workspace(database: Database, workspace: str) -> Workspace:
    """Refuse the workspace's keys from now on; a second time changes nothing. Raises `NotFound`.

    Each of its keys is announced on `greenroom_keys`, so that no cache keeps one. What it used stays in the ledger.
    """
    row = await database.fetchrow(
        f"""WITH disabled AS (
                UPDATE workspace SET disabled_at = coalesce(disabled_at, now()) WHERE name = $1 RETURNING {_COLUMNS}
            ), told AS (
                SELECT count(pg_notify('greenroom_keys', api_key.id)) FROM api_key WHERE workspace = $1
            )
            SELECT disabled.* FROM disabled, told""",  # noqa: S608
        workspace,
    )
    return _workspace(_one(row, workspace))


def _one(row: Record | None, workspace: str) -> Record:
    if row is None:
        raise NotFound(f"there is no workspace {workspace}")
    return row


def _workspace(row: Record) -> Workspace:
    fields: dict[str, Any] = dict(row)
    return Workspace(**{**fields, "name": WorkspaceName(fields["name"])})
