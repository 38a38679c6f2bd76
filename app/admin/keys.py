"""`/admin/v1/workspaces/{workspace}/keys`: a workspace's API keys. A key's text is only in the answer that made it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from app.admin.pages import After, Limit, Page, moment, moment_or_none, page, position
from app.admin.parts import Parts
from app.admin.problems import PROBLEMS, FieldInvalid
from tenants import queries
from tenants.keys import RANDOM_BYTES, KeyKind, digest, generate
from tenants.model import Key


class KeyCreate(Struct, frozen=True, forbid_unknown_fields=True):
    """A key to make."""

    label: Annotated[str, Meta(max_length=100)] = ""
    """For people: what it is for."""
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None


class KeyView(Struct, frozen=True, kw_only=True):
    """A key as it is; not the key itself."""

    id: str
    workspace: str
    label: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class KeyCreated(KeyView, frozen=True, kw_only=True):
    """A new key; the only answer that has its text."""

    key: str


def view(key: Key, workspace: str) -> KeyView:
    """A key as the API shows it."""
    return KeyView(
        id=key.id,
        workspace=workspace,
        label=key.label,
        created_at=moment(key.created_at),
        expires_at=moment_or_none(key.expires_at),
        revoked_at=moment_or_none(key.revoked_at),
    )


@post("/workspaces/{workspace:str}/keys", tags=["keys"], responses=PROBLEMS)
async def create_key(workspace: FromPath[str], parts: Parts, data: JSONBody[KeyCreate]) -> KeyCreated:
    """Make a key. `key` is shown now and never again."""
    if data.expires_at is not None and data.expires_at.timestamp() <= parts.clock():
        raise FieldInvalid("expires_at", "is in the past")
    key = generate(KeyKind.WORKSPACE, parts.random(RANDOM_BYTES))
    expires_at = data.expires_at.timestamp() if data.expires_at else None
    stored = await queries.create_key(
        parts.pool, workspace, key.id, digest(parts.pepper, key), label=data.label, expires_at=expires_at
    )
    return KeyCreated(**msgspec.structs.asdict(view(stored, workspace)), key=key.text)


@get("/workspaces/{workspace:str}/keys", tags=["keys"], responses=PROBLEMS)
async def list_keys(workspace: FromPath[str], parts: Parts, limit: Limit = 100, after: After = None) -> Page[KeyView]:
    """A workspace's keys, oldest first, revoked ones too."""
    await queries.get_workspace(parts.pool, workspace)
    found = await queries.list_keys(parts.pool, workspace, after=position(after), limit=limit + 1)
    return page(found, limit, lambda key: key.id, lambda key: view(key, workspace))


@delete("/workspaces/{workspace:str}/keys/{key:str}", status_code=200, tags=["keys"], responses=PROBLEMS)
async def revoke_key(workspace: FromPath[str], key: FromPath[str], parts: Parts) -> KeyView:
    """Refuse the key from now on, everywhere within two seconds; the answer is the revoked key."""
    return view(await queries.revoke_key(parts.pool, workspace, key), workspace)


ROUTES = [create_key, list_keys, revoke_key]
