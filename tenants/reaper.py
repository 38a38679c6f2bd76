"""The reaper: closes what no gateway will close, with the tokens of the engine book.

Two kinds of open rows are its own:

- `pending`: the gateway said how the request ended but not its tokens, since the client of an answer that wasn't
  streamed left before it was there. All else of the event is the gateway's.
- of a gateway whose lease ended some time ago: it is dead, and the request is entered as `gateway_lost`.

An engine writes a request's lines when its sequences end; it aborts them when the gateway's connection goes. Until all
`sequences` lines are there a row waits, for `BOOK_GRACE_S` at most: then what is there is taken, and nothing (tokens of
an engine that died with them are the platform's) if there is none. Only a leader runs a reaper, but two at once do no
harm: a row is locked while it is closed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import asyncpg
import msgspec
import structlog

from tenants import queries
from tenants.entries import clean, write
from tenants.queries import Attempt, Closing, LeftOpen
from tenants.queries.database import Connection, within
from tenants.usage import BookTotals, Outcome, RequestId, Source, Tokens, UsageClose

SILENT_S: Final = 3.0
"""After the end of a gateway's lease: time for engines to notice that it is gone, and for a clock that is late."""
BOOK_GRACE_S: Final = 15.0
"""The longest wait for the lines of an engine book, from the request's end or the gateway's."""
FORGET_S: Final = 3600.0
"""An instance that has been silent for so long and has nothing open is forgotten."""
PAGE: Final = 500
SWEEP_S: Final = 30.0

Find = Callable[[RequestId, int, float], Awaitable[BookTotals | None]]
"""Looks a request's attempt up in the engine books; the last argument is when it was received."""

_Due = tuple[LeftOpen, UsageClose]

log = structlog.get_logger()


class Reaper:
    """Closes left rows; `pool` and what `find` reads stay the caller's."""

    def __init__(self, pool: asyncpg.Pool[Any], find: Find) -> None:
        self._pool = pool
        self._find = find

    async def sweep(self, now: float) -> int:
        """Close every left row that can be closed now; how many were. Raises one of `AWAY` if Postgres is away."""
        closed, after = 0, None
        while True:
            page = await self._page(after)
            closed += await self._close(page, now)
            if len(page) < PAGE:
                break
            after = (page[-1].open.request_id, page[-1].open.attempt)
        await within(self._pool, SWEEP_S, lambda c: queries.remove_dead_instances(c, silent_s=FORGET_S))
        return closed

    async def _page(self, after: Attempt | None) -> tuple[LeftOpen, ...]:
        async def read(connection: Connection) -> tuple[LeftOpen, ...]:
            return await queries.all_usage_left_open(connection, grace_s=SILENT_S, after=after, limit=PAGE)

        return await within(self._pool, SWEEP_S, read)

    async def _close(self, page: tuple[LeftOpen, ...], now: float) -> int:
        due = [due for row in page if (due := await self._due(row, now)) is not None]
        closed: set[Attempt] = set()

        async def close(rows: Sequence[_Due]) -> None:
            closed.update(await within(self._pool, SWEEP_S, lambda connection: _close(connection, rows)))

        poison = await write(due, close) if due else {}
        for row, closing in due:
            facts = {"request_id": str(closing.request_id), "attempt": closing.attempt, "workspace": row.open.workspace}
            if (row, closing) in poison:
                log.error("reaping_impossible", error=poison[row, closing], **facts)
            elif (closing.request_id, closing.attempt) in closed:
                log.info("request_reaped", outcome=closing.outcome, source=closing.source, **facts)
        return len(closed)

    async def _due(self, row: LeftOpen, now: float) -> _Due | None:
        """A row and how to close it. One whose book can't be read waits until it can: a guess would be for good."""
        request = row.open
        try:
            totals = await self._find(request.request_id, request.attempt, request.received_at)
        except OSError as error:
            log.error("book_unreadable", request_id=str(request.request_id), error=str(error))
            return None
        closing = closing_of(row, totals, now)
        return None if closing is None else (row, clean(closing))


async def _close(connection: Connection, due: Sequence[_Due]) -> set[Attempt]:
    """Close those rows that are still as they were read; the others are another closer's."""
    async with connection.transaction():
        ours = await queries.all_usage_lock(connection, [row for row, _ in due], grace_s=SILENT_S)
        closings = [Closing(row.open, closing) for row, closing in due if (closing.request_id, closing.attempt) in ours]
        return await queries.all_usage_close(connection, closings) if closings else set()


def closing_of(row: LeftOpen, totals: BookTotals | None, now: float) -> UsageClose | None:
    """How a left row is to be closed, or `None` while its engine may still write. Pure."""
    complete = totals is not None and totals.lines >= row.open.sequences
    waited_s = row.silent_s if row.pending is None else now - row.pending.ended_at
    if not complete and waited_s < BOOK_GRACE_S:
        return None
    said = row.pending or _lost(row, totals, now)
    if totals is None:
        return _with(said, Tokens(), Source.NONE, said.engine, "no engine book has it")
    note = None if complete else f"the book has {totals.lines} of {row.open.sequences} sequences"
    return _with(said, totals.tokens, Source.BOOK, totals.engine, note)


def _lost(row: LeftOpen, totals: BookTotals | None, now: float) -> UsageClose:
    ended_at = max(row.open.received_at, totals.finished_at if totals is not None else now - max(row.silent_s, 0.0))
    return UsageClose(
        request_id=row.open.request_id,
        attempt=row.open.attempt,
        outcome=Outcome.GATEWAY_LOST,
        final=True,
        source=None,
        tokens=Tokens(),
        ended_at=ended_at,
        duration_us=round((ended_at - row.open.received_at) * 1e6),
    )


def _with(close: UsageClose, tokens: Tokens, source: Source, engine: str | None, note: str | None) -> UsageClose:
    detail = "; ".join(part for part in (close.detail, note) if part) or None
    return msgspec.structs.replace(close, source=source, tokens=tokens, engine=engine, detail=detail)
