"""Postgres notifications for one process: a dedicated connection that listens and comes back after an outage.

Callbacks are plain functions, called on the event loop; they must not block. While the connection is away nothing is
missed silently: `on_connection` callbacks hear of both edges, and whoever caches must drop what it has when the
connection comes back, since notifications of the time between are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg
import structlog

_RETRY_S = 0.5
_CHECK_S = 1.0
_TIMEOUT_S = 2.0

log = structlog.get_logger()


class Notifications:
    """Listens on channels; owns its connection. Register callbacks before `run`."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._callbacks: dict[str, list[Callable[[str], None]]] = {}
        self._edges: list[Callable[[bool], None]] = []
        self.connected = False

    def on(self, channel: str, callback: Callable[[str], None]) -> None:
        """Call `callback(payload)` for every notification on `channel`."""
        self._callbacks.setdefault(channel, []).append(callback)

    def on_connection(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(True)` whenever listening began (again) and `callback(False)` when the connection was lost."""
        self._edges.append(callback)

    async def run(self) -> None:
        """Listen until cancelled; reconnects each half second while Postgres is away."""
        while True:
            try:
                await self._listen()
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                log.warning("notifications_lost", error=type(error).__name__)
            finally:
                self._edge(connected=False)
            await asyncio.sleep(_RETRY_S)

    async def _listen(self) -> None:
        connection = await asyncpg.connect(self._dsn, timeout=_TIMEOUT_S)
        try:
            for channel in self._callbacks:
                await connection.add_listener(channel, self._received)
            self._edge(connected=True)
            while not connection.is_closed():
                # A server that froze or vanished without a word is noticed by this, within a second or two.
                async with asyncio.timeout(_TIMEOUT_S):
                    await connection.execute("SELECT")
                await asyncio.sleep(_CHECK_S)
        finally:
            connection.terminate()

    def _received(self, _connection: object, _pid: int, channel: str, payload: object) -> None:
        for callback in self._callbacks.get(channel, ()):
            callback(str(payload))

    def _edge(self, *, connected: bool) -> None:
        if connected == self.connected:
            return
        self.connected = connected
        for callback in self._edges:
            callback(connected)
