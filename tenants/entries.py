"""What the ledger's writing side keeps of each attempt, and how a batch of them is written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from tenants.queries import Attempt, Closing
from tenants.usage import Outcome, Source, Tokens, UsageClose, UsageOpen

COMMIT_S: Final = 2.0
"""The longest that one commit may take, and that an open waits before the next failure refuses it."""
DETAIL_MAX: Final = 500

_POISON: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError, OverflowError, TypeError)
"""What one row that the database can't take does to its whole batch; tried before `AWAY`."""

T = TypeVar("T")
R = TypeVar("R")


class Entry:
    """One attempt that this gateway answers for."""

    __slots__ = ("close", "closed", "deadline", "durable", "follows", "next", "open", "opened", "sent")

    def __init__(self, row: UsageOpen, *, follows: bool = False) -> None:
        self.open = row
        self.follows = follows
        """It is part of a request that was accepted: the close of the attempt before writes its row."""
        self.opened: asyncio.Future[None] | None = None
        self.deadline = 0.0
        """On the loop's clock: `opened` fails at the first failure after it."""
        self.sent = False
        """Its row may be in the database."""
        self.durable = False
        """Its row is."""
        self.close: UsageClose | None = None
        self.closed: asyncio.Future[None] | None = None
        self.next: Entry | None = None
        """The attempt that the close of this one opens."""

    @property
    def attempt(self) -> Attempt:
        """Its key in the ledger."""
        return self.open.request_id, self.open.attempt

    @property
    def closing(self) -> Closing:
        """What is to be written once it is closed."""
        if self.close is None:
            raise RuntimeError(f"attempt {self.attempt} isn't closed")
        return Closing(self.open, self.close)


def clean(row: UsageClose) -> UsageClose:
    """The same as the database can take it, so that one close doesn't spoil those beside it.

    `detail` has bounded length, no NUL and no half characters; an `engine` that is no UUID is left out. An attempt that
    isn't final costs nothing, so its tokens, if unknown, aren't waited for.
    """
    changes: dict[str, Any] = {}
    if row.detail is not None:
        changes["detail"] = row.detail[:DETAIL_MAX].replace("\0", "").encode(errors="replace").decode()
    if row.engine is not None and not _is_uuid(row.engine):
        changes["engine"] = None
    if row.source is None and not row.final:
        changes |= {"source": Source.NONE, "tokens": Tokens()}
    return msgspec.structs.replace(row, **changes) if changes else row


def lost(row: UsageOpen, now: float) -> UsageClose:
    """The close of an attempt of which this gateway knows nothing more: the reaper looks for its tokens."""
    return UsageClose(
        request_id=row.request_id,
        attempt=row.attempt,
        outcome=Outcome.GATEWAY_LOST,
        final=True,
        source=None,
        tokens=Tokens(),
        ended_at=now,
        duration_us=max(0, round((now - row.received_at) * 1e6)),
        detail="the gateway could not keep how it ended",
    )


async def bounded(statement: Awaitable[T]) -> T:
    """Wait for a statement, for `COMMIT_S` at most; `TimeoutError` after that."""
    async with asyncio.timeout(COMMIT_S):
        return await statement


async def write(batch: Sequence[R], statement: Callable[[Sequence[R]], Awaitable[None]]) -> dict[R, str]:
    """Write a batch in one statement; if a row spoils it, by halves. Returns what will never be taken, and why."""
    try:
        await bounded(statement(batch))
    except _POISON as error:
        if len(batch) == 1:
            return {batch[0]: type(error).__name__}
        half = len(batch) // 2
        return await write(batch[:half], statement) | await write(batch[half:], statement)
    return {}


def resolve(future: asyncio.Future[None]) -> None:
    """It is durable."""
    if not future.done():
        future.set_result(None)


def fail(future: asyncio.Future[None], error: Exception) -> None:
    """It won't be; whoever waits hears of it, and it is no fault if nobody does."""
    if not future.done():
        future.set_exception(error)
        future.exception()


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
