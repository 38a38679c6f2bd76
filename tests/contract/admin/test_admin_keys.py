from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeAlias

import asyncpg
import pytest
from httpx import AsyncClient as Client

from app.admin.parts import AdminParts
from tenants.errors import KeyRefused

Pool: TypeAlias = "asyncpg.Pool[Any]"
KEYS = "/admin/v1/workspaces/acme/keys"


async def test_a_key_is_shown_once_and_opens_its_workspace(acme: Client, parts: AdminParts, db_pool: Pool) -> None:
    made = await acme.post(KEYS, json={"label": "laptop"})
    key = made.json()
    assert made.status_code == 201
    assert key["key"].startswith(f"gr-{key['id']}-")
    assert (key["workspace"], key["label"], key["expires_at"], key["revoked_at"]) == ("acme", "laptop", None, None)
    caller = await parts.authenticator.authenticate(f"Bearer {key['key']}", now=0)
    assert caller.workspace == "acme"

    listed = await acme.get(KEYS)
    assert listed.json()["data"] == [{name: value for name, value in key.items() if name != "key"}]
    assert key["key"] not in listed.text
    stored = await db_pool.fetchval("SELECT string_agg(api_key::text, ' ') FROM api_key")
    assert key["key"].rsplit("-", 1)[1] not in stored


async def test_a_revoked_key_opens_nothing_and_revoking_again_changes_nothing(acme: Client, parts: AdminParts) -> None:
    key = (await acme.post(KEYS, json={})).json()
    revoked = await acme.delete(f"{KEYS}/{key['id']}")
    assert revoked.status_code == 200
    assert revoked.json()["revoked_at"] is not None
    assert (await acme.delete(f"{KEYS}/{key['id']}")).json() == revoked.json()
    with pytest.raises(KeyRefused, match="revoked"):
        await parts.authenticator.authenticate(f"Bearer {key['key']}", now=0)


async def test_i7_a_key_is_revoked_only_through_its_own_workspace(acme: Client) -> None:
    await acme.post("/admin/v1/workspaces", json={"name": "other"})
    key = (await acme.post(KEYS, json={})).json()
    assert (await acme.delete(f"/admin/v1/workspaces/other/keys/{key['id']}")).status_code == 404
    assert (await acme.get("/admin/v1/workspaces/other/keys")).json() == {"data": [], "next": None}
    assert (await acme.get(KEYS)).json()["data"][0]["revoked_at"] is None


async def test_a_key_may_expire_but_not_in_the_past(acme: Client, surroundings: Any) -> None:
    later = datetime.fromtimestamp(surroundings.now + 60, UTC).isoformat().replace("+00:00", "Z")
    assert (await acme.post(KEYS, json={"expires_at": later})).json()["expires_at"] == later
    response = await acme.post(KEYS, json={"expires_at": "2020-01-01T00:00:00Z"})
    assert (response.status_code, response.json()["detail"]) == (400, "expires_at: is in the past")
    response = await acme.post(KEYS, json={"expires_at": "2040-01-01T00:00:00"})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (400, "expires_at")


async def test_keys_come_in_pages_oldest_first(acme: Client) -> None:
    made = [(await acme.post(KEYS, json={})).json()["id"] for _ in range(3)]
    first = (await acme.get(f"{KEYS}?limit=2")).json()
    second = (await acme.get(f"{KEYS}?limit=2&after={first['next']}")).json()
    assert [key["id"] for key in first["data"] + second["data"]] == made
    assert second["next"] is None
