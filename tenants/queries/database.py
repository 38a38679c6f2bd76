"""What queries run on: a connection, or a pool that lends one for a single statement; and how to bound their time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"
Database: TypeAlias = "Connection | asyncpg.Pool[Any]"
T = TypeVar("T")

AWAY: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server's last word came before the statement, the end of the connection after it
)
"""What a statement raises that can't be run now: no server, no answer in time, a server that refuses."""

_RELEASE_S: Final = 1.0


async def within(pool: asyncpg.Pool[Any], seconds: float, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Do `work` on a connection of the pool, all within `seconds` even if the server has frozen; `TimeoutError` if not.

    After any error the connection is thrown away: whatever still runs on it, nobody waits for.
    """
    connection: PoolConnectionProxy[Any] | None = None
    try:
        async with asyncio.timeout(seconds):
            connection = await pool.acquire(timeout=seconds)
            return await work(connection)
    except BaseException:
        if connection is not None:
            discard(connection)
        raise
    finally:
        if connection is not None:
            await give_back(pool, connection)


def discard(connection: PoolConnectionProxy[Any]) -> None:
    """Cut a connection without a word to the server."""
    with contextlib.suppress(asyncpg.InterfaceError):  # it was lost and is out of the pool already
        connection.terminate()


async def give_back(pool: asyncpg.Pool[Any], connection: PoolConnectionProxy[Any]) -> None:
    """Return a connection to its pool; one that can't be reset within a second is cut instead."""
    with contextlib.suppress(*AWAY):
        await pool.release(connection, timeout=_RELEASE_S)
