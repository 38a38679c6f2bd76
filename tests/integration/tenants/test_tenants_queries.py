"""Workspaces and keys in a real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import asyncpg
import pytest

from tenants import queries
from tenants.errors import Conflict, NameInvalid, NotFound
from tenants.model import KeyId

Pool: TypeAlias = "asyncpg.Pool[Any]"
HMAC = bytes(32)


async def test_a_workspace_is_made_once_and_found(db_pool: Pool) -> None:
    made = await queries.create_workspace(db_pool, "acme")
    assert made.name == "acme"
    assert made.disabled_at is None
    assert await queries.get_workspace(db_pool, "acme") == made
    with pytest.raises(Conflict, match="acme exists already"):
        await queries.create_workspace(db_pool, "acme")
    with pytest.raises(NotFound, match="no workspace globex"):
        await queries.get_workspace(db_pool, "globex")


@pytest.mark.parametrize("name", ["", "Acme", "-acme", "acme-", "a b", "a" * 65, "acme\n", "ä"])
async def test_a_bad_workspace_name_is_refused_with_what_a_name_is(db_pool: Pool, name: str) -> None:
    with pytest.raises(NameInvalid, match="1 to 64 characters"):
        await queries.create_workspace(db_pool, name)


async def test_workspaces_come_in_pages_by_name(db_pool: Pool) -> None:
    names = ["a", "a-b", "a.b", "b", "c"]
    for name in reversed(names):
        await queries.create_workspace(db_pool, name)
    seen: list[str] = []
    while page := await queries.all_workspaces(db_pool, after=seen[-1] if seen else None, limit=2):
        seen += [workspace.name for workspace in page]
    assert seen == names


async def test_disabling_a_workspace_announces_each_of_its_keys(db_pool: Pool) -> None:
    await queries.create_workspace(db_pool, "acme")
    await queries.create_workspace(db_pool, "globex")
    for workspace, key in [("acme", "k1"), ("acme", "k2"), ("globex", "k3")]:
        await queries.create_key(db_pool, workspace, KeyId(key), HMAC)
    told: asyncio.Queue[str] = asyncio.Queue()
    async with db_pool.acquire() as connection:
        await connection.add_listener(queries.KEYS_CHANNEL, lambda *call: told.put_nowait(str(call[3])))
        first = await queries.disable_workspace(db_pool, "acme")
        assert {await told.get(), await told.get()} == {"k1", "k2"}
        assert first.disabled_at is not None
        assert await queries.disable_workspace(db_pool, "acme") == first
        assert (await queries.get_workspace(db_pool, "globex")).disabled_at is None
        with pytest.raises(NotFound):
            await queries.disable_workspace(db_pool, "initech")
        await connection.reset()


async def test_a_key_is_made_listed_and_revoked(db_pool: Pool) -> None:
    await queries.create_workspace(db_pool, "acme")
    made = await queries.create_key(db_pool, "acme", KeyId("k1"), HMAC, label="ci", expires_at=2_000_000_000.5)
    assert (made.id, made.workspace, made.label, made.expires_at) == ("k1", "acme", "ci", 2_000_000_000.5)
    assert await queries.list_keys(db_pool, "acme") == (made,)
    revoked = await queries.revoke_key(db_pool, "acme", "k1")
    assert revoked.revoked_at is not None
    assert await queries.revoke_key(db_pool, "acme", "k1") == revoked
    assert await queries.list_keys(db_pool, "acme") == (revoked,)


async def test_a_revocation_is_announced_when_it_commits(db_pool: Pool) -> None:
    await queries.create_workspace(db_pool, "acme")
    await queries.create_key(db_pool, "acme", KeyId("k1"), HMAC)
    told: asyncio.Queue[str] = asyncio.Queue()
    async with db_pool.acquire() as listening, db_pool.acquire() as connection:
        await listening.add_listener(queries.KEYS_CHANNEL, lambda *call: told.put_nowait(str(call[3])))
        async with connection.transaction():
            await queries.revoke_key(connection, "acme", "k1")
            await listening.execute("SELECT")
            assert told.empty()
        assert await told.get() == "k1"
        await listening.reset()


async def test_a_key_without_a_workspace_that_exists_or_with_a_taken_id_is_refused(db_pool: Pool) -> None:
    with pytest.raises(NotFound, match="no workspace acme"):
        await queries.create_key(db_pool, "acme", KeyId("k1"), HMAC)
    await queries.create_key(db_pool, None, KeyId("k1"), HMAC)
    with pytest.raises(Conflict, match="k1 exists already"):
        await queries.create_key(db_pool, None, KeyId("k1"), HMAC)


async def test_i7_no_workspace_lists_or_revokes_the_keys_of_another_or_of_operators(db_pool: Pool) -> None:
    for workspace in ("acme", "globex"):
        await queries.create_workspace(db_pool, workspace)
    await queries.create_key(db_pool, "acme", KeyId("k1"), HMAC)
    await queries.create_key(db_pool, None, KeyId("op"), HMAC)
    assert await queries.list_keys(db_pool, "globex") == ()
    assert await queries.list_keys(db_pool, "globex", after="k1") == ()
    for workspace, key in [("globex", "k1"), ("globex", "op"), ("acme", "op"), (None, "k1")]:
        with pytest.raises(NotFound):
            await queries.revoke_key(db_pool, workspace, key)
    assert [key.id for key in await queries.list_keys(db_pool, None)] == ["op"]


async def test_keys_come_in_pages_oldest_first(db_pool: Pool) -> None:
    await queries.create_workspace(db_pool, "acme")
    async with db_pool.acquire() as connection, connection.transaction():  # equal times within a transaction
        for key in ("k3", "k1", "k2"):
            await queries.create_key(connection, "acme", KeyId(key), HMAC)
    await queries.create_key(db_pool, "acme", KeyId("k0"), HMAC)
    seen: list[str] = []
    while page := await queries.list_keys(db_pool, "acme", after=seen[-1] if seen else None, limit=2):
        seen += [key.id for key in page]
    assert seen == ["k1", "k2", "k3", "k0"]


async def test_stored_keys_come_with_their_hmac_and_whether_the_workspace_is_disabled(db_pool: Pool) -> None:
    await queries.create_workspace(db_pool, "acme")
    one = await queries.create_key(db_pool, "acme", KeyId("k1"), b"\1" * 32)
    two = await queries.create_key(db_pool, None, KeyId("op"), b"\2" * 32)
    await queries.disable_workspace(db_pool, "acme")
    found = await queries.all_stored_keys(db_pool, [KeyId("k1"), KeyId("op"), KeyId("nobody")])
    assert {stored.key.id: stored for stored in found} == {
        "k1": queries.StoredKey(one, b"\1" * 32, disabled=True),
        "op": queries.StoredKey(two, b"\2" * 32, disabled=False),
    }
