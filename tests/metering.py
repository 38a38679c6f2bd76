"""Rows for the ledger, a ledger that runs, a book that can be written into, and what is in the tables in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from msgspec import Struct
from uuid_utils.compat import uuid7

from tenants.ledger import Ledger
from tenants.model import KeyId, WorkspaceName
from tenants.usage import BookTotals, Outcome, RequestId, Source, Tokens, UsageClose, UsageOpen

Pool: TypeAlias = "asyncpg.Pool[Any]"

GATEWAY = "018f0000-0000-7000-8000-000000000001"
ENGINE = "018f0000-0000-7000-8000-00000000000e"
NOW = 1_767_225_600.0  # 2026-01-01 00:00 UTC
TOKENS = Tokens(prompt=10, cached=4, completion=5)


def opened(**fields: Any) -> UsageOpen:
    """An open row of a new request."""
    said: dict[str, Any] = {
        "request_id": RequestId(uuid7()),
        "attempt": 1,
        "workspace": WorkspaceName("acme"),
        "key": KeyId("k1"),
        "variant": "bot",
        "model": "smollm2",
        "endpoint": "chat",
        "stream": True,
        "sequences": 1,
        "gateway": GATEWAY,
        "received_at": NOW,
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    return UsageOpen(**{**said, **fields})


def closed(row: UsageOpen, **fields: Any) -> UsageClose:
    """How that attempt ended: by default completed, with `TOKENS` from the stream."""
    said: dict[str, Any] = {
        "request_id": row.request_id,
        "attempt": row.attempt,
        "outcome": Outcome.COMPLETED,
        "final": True,
        "source": Source.STREAM,
        "tokens": TOKENS,
        "ended_at": row.received_at + 1.5,
        "engine": ENGINE,
        "duration_us": 1_500_000,
    }
    return UsageClose(**{**said, **fields})


class Event(Struct, frozen=True, order=True):
    """What tests compare of an event."""

    attempt: int
    revision: int
    final: bool
    outcome: str
    source: str
    prompt: int
    cached: int
    completion: int


def event(
    outcome: Outcome = Outcome.COMPLETED,
    source: Source = Source.STREAM,
    tokens: Tokens = TOKENS,
    *,
    attempt: int = 1,
    revision: int = 0,
    final: bool = True,
) -> Event:
    """An event as it should be."""
    return Event(attempt, revision, final, outcome, source, tokens.prompt, tokens.cached, tokens.completion)


class Tables(Struct, frozen=True):
    """All that the ledger holds."""

    events: dict[UUID, list[Event]]
    opens: dict[UUID, list[int]]
    """Attempts with an open row."""

    def last(self, request: UUID) -> list[Event]:
        """The highest revision of each attempt."""
        return list({e.attempt: e for e in self.events.get(request, [])}.values())

    def check_i1(self) -> None:
        """I1: a request has either one open row or exactly one final event, and an attempt at most one correction."""
        for request in self.events.keys() | self.opens.keys():
            finals = [e for e in self.last(request) if e.final]
            assert len(finals) + len(self.opens.get(request, [])) == 1, (request, self.events.get(request))
            revisions = Counter(e.attempt for e in self.events.get(request, []))
            assert max(revisions.values(), default=0) <= 2, (request, self.events[request])


async def tables(pool: Pool) -> Tables:
    """What is there now."""
    events, opens = defaultdict(list), defaultdict(list)
    for row in await pool.fetch(
        """SELECT request_id, attempt, revision, final, outcome, source, prompt_tokens, cached_tokens, completion_tokens
             FROM usage_event ORDER BY request_id, attempt, revision"""
    ):
        request, *values = row.values()
        events[UUID(int=request.int)].append(Event(*values))
    for row in await pool.fetch("SELECT request_id, attempt FROM usage_open"):
        opens[UUID(int=row["request_id"].int)].append(row["attempt"])
    return Tables(dict(events), dict(opens))


@contextlib.asynccontextmanager
async def running(pool: Pool, gateway: str = GATEWAY, **options: Any) -> AsyncIterator[Ledger]:
    """A ledger at work; at the end it is killed: what it has not written stays unwritten, and its lease stays."""
    ledger = Ledger(pool, gateway, pid=1, **options)
    task = asyncio.create_task(ledger.run())
    try:
        yield ledger
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Books:
    """Engine books in memory."""

    def __init__(self) -> None:
        self.lines: dict[tuple[UUID, int], BookTotals] = {}
        self.unreadable = False
        self.asked = 0

    def write(self, row: UsageOpen, tokens: Tokens, lines: int = 1, at: float = NOW + 1) -> None:
        self.lines[row.request_id, row.attempt] = BookTotals(tokens, lines, ENGINE, at)

    async def find(self, request: RequestId, attempt: int, since: float) -> BookTotals | None:
        self.asked += 1
        if self.unreadable:
            raise OSError("a disk that isn't there")
        return self.lines.get((request, attempt))


async def silence(pool: Pool, seconds: float, gateway: str = GATEWAY) -> None:
    """Let a gateway's lease have ended so many seconds ago."""
    await pool.execute(
        """INSERT INTO instance (id, kind, pid, lease_until)
           VALUES ($1, 'gateway', 1, now() - make_interval(secs => $2))
           ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until""",
        UUID(gateway),
        seconds,
    )
