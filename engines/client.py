"""The gateway's way to engines: HTTP over each engine's Unix socket.

One aiohttp session an engine, made when it is first needed and closed when the engine has left the fleet or changed its
address. There is no limit of connections (slots are the limit) and no time-out over a whole answer, only one for
silence. A connection that isn't used goes before the engine would close it, since a request on a connection that is
just being closed is lost.

An `Exchange` owns its connection. `abort` closes it at once, which makes the engine stop generating; it is synchronous,
so that it can stand in a `finally`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import aiohttp

from engines.errors import EngineLost, EngineUnreachable
from engines.model import Engine, EngineId, Fleet

CONNECT_S: Final = 2.0
"""For a Unix socket to accept; a living engine does so at once."""
HEALTH_S: Final = 2.0
"""A dead EngineCore shows in /health within 0.1 s; a frozen engine says nothing."""
IDLE_CONNECTION_S: Final = 2.0
"""vLLM's own server closes a connection after five seconds of silence."""
END_S: Final = 0.05
"""For the end of an answer to follow its last event."""
LARGEST_ERROR: Final = 1 << 20
"""Bytes of an error body that are read."""

REQUEST_ID_HEADER: Final = "X-Request-Id"


class EngineClient:
    """All connections of one gateway to engines."""

    def __init__(self, *, silence_s: float) -> None:
        """`silence_s`: an engine that sends nothing for so long in the middle of an answer is lost."""
        self._timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_S, sock_read=silence_s)
        self._unlimited = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_S, sock_read=None)
        self._sessions: dict[EngineId, tuple[str, aiohttp.ClientSession]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def post(self, engine: Engine, path: str, body: bytes, request_id: str, *, streams: bool) -> Exchange:
        """Send a JSON body and return when the engine has answered with a status line and headers.

        An answer that is not to be streamed comes all at once when it is done, so its silence says nothing and is not
        limited; an engine that dies closes the connection. Raises `EngineUnreachable` if there was no answer.
        """
        session = self._session(engine)
        headers = {"Content-Type": "application/json", REQUEST_ID_HEADER: request_id}
        try:
            response = await session.post(
                f"http://engine{path}",
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=self._timeout if streams else self._unlimited,
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineUnreachable(f"engine {engine.id} did not answer: {_words(error)}") from None
        return Exchange(engine, response)

    async def healthy(self, engine: Engine) -> bool:
        """Whether an engine says that it is well, within `HEALTH_S`."""
        try:
            async with asyncio.timeout(HEALTH_S), self._session(engine).get("http://engine/health") as response:
                return response.status == 200
        except (EngineUnreachable, aiohttp.ClientError, OSError, TimeoutError):
            return False

    def fleet_changed(self, fleet: Fleet) -> None:
        """Close the sessions of engines that are gone."""
        living = {engine.id: engine.address for engine in fleet.engines}
        for engine_id, (address, session) in tuple(self._sessions.items()):
            if living.get(engine_id) != address:
                del self._sessions[engine_id]
                self._close_later(session)

    async def close(self) -> None:
        """Close all connections; what is in flight is aborted."""
        sessions = [session for _, session in self._sessions.values()]
        self._sessions.clear()
        for session in sessions:
            await session.close()
        await asyncio.gather(*self._closing)

    def _session(self, engine: Engine) -> aiohttp.ClientSession:
        if engine.address is None:
            raise EngineUnreachable(f"engine {engine.id} has no address")
        known = self._sessions.get(engine.id)
        if known is not None and known[0] == engine.address:
            return known[1]
        if known is not None:
            self._close_later(known[1])
        session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(engine.address, limit=0, keepalive_timeout=IDLE_CONNECTION_S),
            timeout=self._timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        self._sessions[engine.id] = (engine.address, session)
        return session

    def _close_later(self, session: aiohttp.ClientSession) -> None:
        task = asyncio.create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class Exchange:
    """One request at an engine, from the headers of its answer on."""

    def __init__(self, engine: Engine, response: aiohttp.ClientResponse) -> None:
        self.engine = engine
        self.status = response.status
        self.streams = response.content_type == "text/event-stream"
        self._response = response

    async def some(self) -> bytes:
        """What has come since the last call, at least one byte; empty at the end. `EngineLost` if it breaks off."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineLost(f"engine {self.engine.id} broke off: {_words(error)}") from None

    async def whole(self) -> bytes:
        """All of the answer. `EngineLost` if it breaks off."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineLost(f"engine {self.engine.id} broke off: {_words(error)}") from None

    async def start(self, length: int) -> bytes:
        """Up to `length` bytes of the answer. `EngineLost` if it breaks off."""
        parts: list[bytes] = []
        while length > 0 and (part := await self.some()):
            parts.append(part[:length])
            length -= len(part)
        return b"".join(parts)

    async def finish(self) -> None:
        """After the last event: read what is left of the answer, which is its end, so that the connection is kept."""
        with contextlib.suppress(EngineLost, TimeoutError):
            async with asyncio.timeout(END_S):
                while await self.some():
                    pass

    def abort(self) -> None:
        """Close the connection unless the answer has been read to its end, in which case it is kept for the next."""
        self._response.close()


def _words(error: BaseException) -> str:
    """An exception without addresses or paths in it."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{type(error).__name__} ({error.os_error.strerror or type(error.os_error).__name__})"
    return type(error).__name__
