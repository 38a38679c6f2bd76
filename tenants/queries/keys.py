"""SQL of the table `api_key`. Secrets never come here, only HMACs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import asyncpg
from asyncpg import Record
from msgspec import Struct

from tenants.errors import Conflict, NotFound
from tenants.model import Key, KeyId
from tenants.queries.database import Database

KEYS_CHANNEL: Final = "greenroom_keys"
"""NOTIFY channel: the payload is the id of a key that isn't what it was."""

_COLUMNS: Final = """
    id, workspace, label, extract(epoch FROM created_at)::float8 AS created_at,
    extract(epoch FROM expires_at)::float8 AS expires_at, extract(epoch FROM revoked_at)::float8 AS revoked_at
"""


class StoredKey(Struct, frozen=True):
    """What the gateway needs to check a key."""

    key: Key
    hmac: bytes
    disabled: bool
    """Its workspace is disabled."""


async def create_key(
    database: Database,
    workspace: str | None,
    key_id: KeyId,
    hmac: bytes,
    *,
    label: str = "",
    expires_at: float | None = None,
) -> Key:
    """Store a key's HMAC; `workspace` is `None` for an operator's. Raises `NotFound` without such a workspace."""
    try:
        row = await database.fetchrow(
            f"""INSERT INTO api_key (workspace, id, hmac, label, expires_at)
                VALUES ($1, $2, $3, $4, to_timestamp($5)) RETURNING {_COLUMNS}""",  # noqa: S608
            workspace,
            key_id,
            hmac,
            label,
            expires_at,
        )
    except asyncpg.ForeignKeyViolationError:
        raise NotFound(f"there is no workspace {workspace}") from None
    except asyncpg.UniqueViolationError:
        raise Conflict(f"key {key_id} exists already") from None
    return _key(_one(row, key_id))


async def list_keys(
    database: Database, workspace: str | None, *, after: str | None = None, limit: int = 100
) -> tuple[Key, ...]:
    """At most `limit` keys of a workspace (`None`: operators'), oldest first, from the one behind `after` on."""
    rows = await database.fetch(
        f"""SELECT {_COLUMNS} FROM api_key
             WHERE workspace IS NOT DISTINCT FROM $1
               AND ($2::text IS NULL OR (api_key.created_at, id) > (
                    SELECT p.created_at, p.id FROM api_key p WHERE p.id = $2 AND p.workspace IS NOT DISTINCT FROM $1))
             ORDER BY api_key.created_at, id LIMIT $3""",  # noqa: S608
        workspace,
        after,
        limit,
    )
    return tuple(_key(row) for row in rows)


async def revoke_key(database: Database, workspace: str | None, key_id: str) -> Key:
    """Refuse the key from now on and tell the gateways; a second time changes nothing. Raises `NotFound`."""
    row = await database.fetchrow(
        f"""WITH revoked AS (
                UPDATE api_key SET revoked_at = coalesce(revoked_at, now())
                 WHERE workspace IS NOT DISTINCT FROM $1 AND id = $2 RETURNING {_COLUMNS}
            ), told AS (SELECT count(pg_notify('greenroom_keys', revoked.id)) FROM revoked)
            SELECT revoked.* FROM revoked, told""",  # noqa: S608
        workspace,
        key_id,
    )
    return _key(_one(row, key_id))


async def all_stored_keys(
    database: Database, ids: Sequence[KeyId]
) -> tuple[StoredKey, ...]:  # cross-tenant: whose a key is, is what it answers
    """Those of `ids` that exist, in any order."""
    rows = await database.fetch(
        """SELECT k.id, k.workspace, k.label, k.hmac, w.disabled_at IS NOT NULL AS disabled,
                  extract(epoch FROM k.created_at)::float8 AS created_at,
                  extract(epoch FROM k.expires_at)::float8 AS expires_at,
                  extract(epoch FROM k.revoked_at)::float8 AS revoked_at
             FROM api_key k LEFT JOIN workspace w ON w.name = k.workspace
            WHERE k.id = ANY($1::text[])""",
        ids,
    )
    return tuple(
        StoredKey(_key({n: v for n, v in row.items() if n not in {"hmac", "disabled"}}), row["hmac"], row["disabled"])
        for row in rows
    )


def _one(row: Record | None, key_id: str) -> Record:
    if row is None:
        raise NotFound(f"there is no key {key_id}")
    return row


def _key(row: Record | dict[str, Any]) -> Key:
    return Key(**dict(row))
