"""Draining: a gateway stops taking requests and lets those that it has go on for a while.

    begin ── new requests are refused; `callbacks` hear of it; the deadline is set
    hurry ── the deadline is now
    deadline ── every request that is still open is interrupted, and may then end cleanly

The server's signal handler begins it, before uvicorn does anything. Owned by one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Interruptible(Protocol):
    """An open request."""

    def deadline(self) -> None:
        """Its time is over. Must not block."""
        ...


class Drain:
    """Knows the open requests and whether the gateway drains."""

    def __init__(self, grace_s: float) -> None:
        """`grace_s`: how long open requests may go on after `begin`."""
        self._grace_s = grace_s
        self._open: set[Interruptible] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._began = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._over = False

    @property
    def began(self) -> bool:
        """New requests are refused."""
        return self._began.is_set()

    def on_begin(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when draining begins."""
        self._callbacks.append(callback)

    def begin(self) -> None:
        """Refuse what is new from now on. Repeating it does nothing."""
        if self.began:
            return
        self._began.set()
        for callback in self._callbacks:
            callback()
        asyncio.get_running_loop().call_later(self._grace_s, self.hurry)

    def hurry(self) -> None:
        """Interrupt all open requests now, and those to come at once."""
        self._over = True
        for request in tuple(self._open):
            request.deadline()

    def enter(self, request: Interruptible) -> None:
        """A request is open."""
        self._open.add(request)
        self._idle.clear()
        if self._over:
            request.deadline()

    def leave(self, request: Interruptible) -> None:
        """A request is over."""
        self._open.discard(request)
        if not self._open:
            self._idle.set()

    async def until_begun(self) -> None:
        """Wait for `begin`."""
        await self._began.wait()

    async def until_idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    @property
    def open(self) -> int:
        """Open requests."""
        return len(self._open)
