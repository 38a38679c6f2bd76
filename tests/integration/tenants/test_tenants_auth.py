"""Keys against a real Postgres: what is cached, what is refused, and what an absent database or channel does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tenants import keys, queries
from tenants.auth import CHANNEL_DOWN_S, LOOKUP_KEYS, REFUSED_MAX, REFUSED_S, Authenticator
from tenants.errors import AuthUnavailable, KeyRefused
from tenants.keys import KeyKind, KeyText
from tenants.model import Caller, WorkspaceName

PEPPER = b"pepper"
NOW = 1_700_000_000.0
ACME = WorkspaceName("acme")


class Place:
    """A database with one workspace, an authenticator, and a count of its look-ups."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self.pool = pool
        self.now = NOW
        self.auth = Authenticator(pool, PEPPER, lambda: self.now)
        self.auth.channel_changed(True, NOW)
        self.lookups = 0

    def logged(self, record: Any) -> None:
        self.lookups += "FROM api_key k LEFT JOIN workspace" in record.query

    async def key(self, workspace: str | None = "acme", seed: int = 1, expires_at: float | None = None) -> KeyText:
        kind = KeyKind.OPERATOR if workspace is None else KeyKind.WORKSPACE
        key = keys.generate(kind, seed.to_bytes(4, "big") * 10)
        await queries.create_key(self.pool, workspace, key.id, keys.digest(PEPPER, key), expires_at=expires_at)
        return key

    async def check(self, key: KeyText | str) -> Caller:
        text = key if isinstance(key, str) else key.text
        return await self.auth.authenticate(f"Bearer {text}", now=self.now)

    async def refusal(self, key: KeyText | str) -> str:
        with pytest.raises(KeyRefused) as refused:
            await self.check(key)
        return str(refused.value)


@pytest.fixture
async def place(database: str) -> AsyncIterator[Place]:
    places: list[Place] = []

    async def count(connection: asyncpg.Connection[Any]) -> None:
        connection.add_query_logger(places[0].logged)

    async with asyncpg.create_pool(database, min_size=0, max_size=4, init=count) as pool:
        places.append(Place(pool))
        await queries.create_workspace(pool, "acme")
        yield places[0]


async def test_a_good_key_is_read_once_and_then_never_again(place: Place) -> None:
    key = await place.key()
    for _ in range(3):
        assert await place.check(key) == Caller(key.id, ACME)
    assert place.lookups == 1


async def test_concurrent_first_requests_share_one_read(place: Place) -> None:
    key = await place.key()
    callers = await asyncio.gather(*(place.check(key) for _ in range(50)))
    assert set(callers) == {Caller(key.id, ACME)}
    assert place.lookups == 1


async def test_an_operators_key_has_no_workspace(place: Place) -> None:
    assert await place.check(await place.key(None)) == Caller(
        keys.generate(KeyKind.OPERATOR, b"\0\0\0\1" * 10).id, None
    )


async def test_a_key_whose_kind_and_row_disagree_is_refused(place: Place) -> None:
    key = keys.generate(KeyKind.OPERATOR, bytes(40))
    await queries.create_key(place.pool, "acme", key.id, keys.digest(PEPPER, key))
    assert "not known" in await place.refusal(key)


async def test_a_wrong_secret_is_refused_like_an_unknown_key_and_never_opens_what_the_right_one_opened(
    place: Place,
) -> None:
    key = await place.key()
    await place.check(key)
    forged = f"gr-{key.id}-{'a' * 52}"
    unknown = keys.generate(KeyKind.WORKSPACE, b"\7" * 40)
    assert await place.refusal(forged) == await place.refusal(unknown)
    assert forged not in await place.refusal(forged)
    assert await place.check(key) == Caller(key.id, ACME)


async def test_i7_a_wrong_secret_for_a_cached_id_takes_the_same_way_as_for_one_that_is_not(place: Place) -> None:
    cached, idle = await place.key(seed=1), await place.key(seed=2)
    await place.check(cached)
    before = place.lookups
    await place.refusal(f"gr-{cached.id}-{'a' * 52}")
    await place.refusal(f"gr-{idle.id}-{'a' * 52}")
    assert place.lookups == before + 2  # a read each: timing doesn't tell whose key was used lately


async def test_a_refused_key_is_remembered_for_seconds_only(place: Place) -> None:
    wrong = keys.generate(KeyKind.WORKSPACE, b"\7" * 40)
    for _ in range(3):
        await place.refusal(wrong)
    assert place.lookups == 1
    place.now += REFUSED_S
    await place.refusal(wrong)
    assert place.lookups == 2


async def test_a_flood_of_wrong_keys_costs_neither_memory_nor_a_read_each(place: Place) -> None:
    flood = [keys.generate(KeyKind.WORKSPACE, i.to_bytes(4, "big") * 10) for i in range(1, REFUSED_MAX + 2001)]
    answers = await asyncio.gather(*(place.check(key) for key in flood), return_exceptions=True)
    assert {type(answer) for answer in answers} == {KeyRefused}
    assert place.lookups <= len(flood) // LOOKUP_KEYS + 2
    assert len(place.auth._refused) == REFUSED_MAX
    assert not place.auth._wanted
    assert not place.auth._looking


async def test_expiry_is_checked_on_every_request_though_the_key_is_cached(place: Place) -> None:
    key = await place.key(expires_at=NOW + 10)
    assert await place.check(key)
    place.now = NOW + 10
    assert "expired" in await place.refusal(key)
    assert place.lookups == 1


async def test_a_revoked_key_is_refused_once_invalidated(place: Place) -> None:
    key = await place.key()
    await place.check(key)
    await queries.revoke_key(place.pool, "acme", key.id)
    assert await place.check(key)  # the notification hasn't come yet
    place.auth.invalidate(key.id)
    assert "revoked" in await place.refusal(key)


async def test_invalidating_one_key_leaves_the_others_cached(place: Place) -> None:
    one, other = await place.key(seed=1), await place.key(seed=2)
    await place.check(one)
    await place.check(other)
    place.auth.invalidate(one.id)
    place.auth.invalidate("unknownunkno")
    await place.check(other)
    assert place.lookups == 2


async def test_a_read_that_an_invalidation_overtook_is_not_kept(place: Place) -> None:
    key = await place.key()
    async with place.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE api_key")
        check = asyncio.create_task(place.check(key))
        while not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
            await asyncio.sleep(0.001)
        place.auth.invalidate(key.id)
    assert await check == Caller(key.id, ACME)
    await place.check(key)
    assert place.lookups == 2


async def test_a_key_made_after_its_refusal_is_good_once_announced(place: Place) -> None:
    await place.refusal(keys.generate(KeyKind.WORKSPACE, b"\0\0\0\1" * 10))
    key = await place.key()
    place.auth.invalidate(key.id)
    assert await place.check(key)


async def test_keys_of_a_disabled_workspace_are_refused(place: Place) -> None:
    key = await place.key()
    await queries.disable_workspace(place.pool, "acme")
    assert await place.refusal(key) == "workspace acme is disabled"


async def test_while_the_channel_is_down_a_key_lives_five_minutes_and_is_then_read_again(place: Place) -> None:
    key = await place.key()
    await place.check(key)
    place.auth.channel_changed(False, NOW + 1000)
    place.now = NOW + 1000 + CHANNEL_DOWN_S
    await place.check(key)
    assert place.lookups == 1
    place.now += 1
    await place.check(key)
    assert place.lookups == 2
    place.now += CHANNEL_DOWN_S
    await place.check(key)
    assert place.lookups == 2
    place.auth.channel_changed(False, place.now)  # said twice: still down since the first time
    place.now += 1
    await place.check(key)
    assert place.lookups == 3


async def test_when_the_channel_is_back_everything_is_read_again(place: Place) -> None:
    key = await place.key()
    await place.check(key)
    place.auth.channel_changed(False, NOW)
    await queries.revoke_key(place.pool, "acme", key.id)
    place.auth.channel_changed(True, NOW + 1)
    assert "revoked" in await place.refusal(key)


async def test_before_the_channel_was_ever_up_a_key_lives_five_minutes(place: Place) -> None:
    place.auth = Authenticator(place.pool, PEPPER, lambda: place.now)
    key = await place.key()
    await place.check(key)
    place.now += CHANNEL_DOWN_S
    await place.check(key)
    assert place.lookups == 1
    place.now += 1
    await place.check(key)
    assert place.lookups == 2


async def test_one_who_leaves_does_not_take_the_answer_from_the_others(place: Place) -> None:
    key = await place.key()
    first, second = asyncio.create_task(place.check(key)), asyncio.create_task(place.check(key))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == Caller(key.id, ACME)
    assert place.lookups == 1


async def test_with_the_database_away_a_cached_key_opens_and_another_gets_no_verdict(place: Place) -> None:
    cached, other = await place.key(seed=1), await place.key(seed=2)
    await place.check(cached)
    await place.pool.close()
    assert await place.check(cached) == Caller(cached.id, ACME)
    answers = await asyncio.gather(*(place.check(other) for _ in range(3)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {AuthUnavailable}


async def test_a_database_that_has_frozen_gives_no_verdict_within_seconds_and_a_good_one_later(place: Place) -> None:
    key = await place.key()
    async with place.pool.acquire() as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
    os.kill(pid, signal.SIGSTOP)
    try:
        many = [keys.generate(KeyKind.WORKSPACE, i.to_bytes(4, "big") * 10) for i in range(1, 3 * LOOKUP_KEYS)]
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(place.check(k) for k in [key, *many]), return_exceptions=True)
        assert {type(answer) for answer in answers} == {AuthUnavailable}
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await place.check(key) == Caller(key.id, ACME)
