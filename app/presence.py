"""Presence: while a request is worked for, its client may leave and the gateway's drain may end.

    async with Presence(receive, drain):
        ...                                 # raises Interrupted here, wherever it waits

Works as `asyncio.timeout` does: what is inside is cancelled, and the cancellation becomes `Interrupted` at the edge. So
every stage (waiting for an engine, for its first token, for a slow client) ends at once without looking for itself.
A cancellation from elsewhere passes through.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from types import TracebackType
from typing import Self

from litestar.types import Receive

from app.drain import Drain


class Reason(Enum):
    """Why a request is not worked for any more."""

    CLIENT_GONE = "client_gone"
    DRAINED = "drained"


class Interrupted(Exception):
    """Work for a request was cut short."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Presence:
    """One request's; the body must have been read, since it consumes what `receive` gives."""

    def __init__(self, receive: Receive, drain: Drain) -> None:
        self._receive = receive
        self._drain = drain
        self._reason: Reason | None = None
        self._task: asyncio.Task[object] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._cancelling = 0

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a presence needs a task to interrupt")
        self._task, self._cancelling = task, task.cancelling()
        self._watch = asyncio.create_task(self._until_gone())
        self._drain.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drain.leave(self)
        if self._watch is not None:
            self._watch.cancel()
        task, self._task = self._task, None
        if self._reason is None or task is None:
            return
        cut_short = kind is not None and issubclass(kind, asyncio.CancelledError)
        if task.uncancel() <= self._cancelling and cut_short:
            raise Interrupted(self._reason) from None

    def deadline(self) -> None:
        """The drain is over."""
        self._interrupt(Reason.DRAINED)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt(Reason.CLIENT_GONE)

    def _interrupt(self, reason: Reason) -> None:
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()
