"""What the queries run on, and how structs go into a statement."""

from __future__ import annotations

from typing import Any, TypeAlias

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy
from msgspec import Struct

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"
Database: TypeAlias = "Connection | asyncpg.Pool[Any]"


def as_json(value: Struct) -> str:
    """A struct as JSON text, for a parameter that is cast by `::text::jsonb`."""
    return msgspec.json.encode(value).decode()
