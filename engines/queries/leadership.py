"""SQL of the table `installation`: who this is, and which controller leads."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from engines.queries.database import Connection, Database

_LEADERSHIP_LOCK: Final = 0x6772_656E_726F_6F6D  # "greenroom"; one controller a database


class Installation(Struct, frozen=True):
    """The database's identity and the epoch of the controller that leads."""

    id: str
    epoch: int


async def installation(database: Database) -> Installation:
    """The installation that `greenroom migrate` made."""
    row = await database.fetchrow("SELECT id, epoch FROM installation")
    if row is None:
        raise LookupError("the database has no installation row; run `greenroom migrate`")
    return Installation(row["id"], row["epoch"])


async def try_leadership(connection: Connection) -> bool:
    """Take the leader's lock for as long as this connection lives; false if another session has it."""
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LEADERSHIP_LOCK))


async def raise_epoch(database: Database) -> int:
    """Begin a new controller's epoch; only the holder of the leader's lock may."""
    epoch = await database.fetchval("UPDATE installation SET epoch = epoch + 1 RETURNING epoch")
    if epoch is None:
        raise LookupError("the database has no installation row; run `greenroom migrate`")
    return int(epoch)


async def ping(database: Database) -> None:
    """Does the connection still answer?"""
    await database.fetchval("SELECT 1")
