from __future__ import annotations

from typing import Any

import asyncpg
import redis.asyncio

from app.stores import EmbeddedValkey


async def test_each_test_has_a_database_of_its_own(db_pool: asyncpg.Pool[Any]) -> None:
    await db_pool.execute("INSERT INTO workspace (name) VALUES ('acme')")
    assert await db_pool.fetchval("SELECT count(*) FROM workspace") == 1


async def test_each_test_has_a_database_of_its_own_again(db_pool: asyncpg.Pool[Any]) -> None:
    assert await db_pool.fetchval("SELECT count(*) FROM workspace") == 0


async def test_valkey_is_empty_and_can_be_killed(valkey: str, valkey_server: EmbeddedValkey) -> None:
    async with redis.asyncio.from_url(valkey) as client:
        assert await client.dbsize() == 0
        await client.set("a", "b")
    assert valkey_server.process is not None
    valkey_server.process.kill()
    valkey_server.stop()
    valkey_server.start()
    async with redis.asyncio.from_url(valkey_server.url) as client:
        assert await client.ping()
