"""A request's response as ASGI messages: whole, streamed, or a refusal, which comes in the stream if that has begun."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from litestar.types import Send

from app import errors

LAST_WORD_S: Final = 2.0
"""The longest wait for a client to take a refusal."""
_DONE: Final = b"data: [DONE]\n\n"
_JSON: Final = (b"content-type", b"application/json")
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Reply:
    """What one client is sent, once."""

    def __init__(self, send: Send, *, began: float) -> None:
        """`began`: when the request was received, on `time.perf_counter`."""
        self._send = send
        self._began = began
        self._streams = False
        self.status = 0
        """0 until something was sent."""

    async def whole(self, body: bytes) -> None:
        """A good answer in one piece."""
        await self._all(200, [_JSON, (b"content-length", str(len(body)).encode())], body)

    async def begin_stream(self) -> None:
        """The head of a stream of events."""
        self._streams = True
        await self._head(200, _STREAM_HEADERS)

    async def more(self, events: bytes) -> None:
        """Some whole events."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_stream(self, *, events: bytes = b"") -> None:
        """The last events and `[DONE]`."""
        await self._send({"type": "http.response.body", "body": events + _DONE, "more_body": False})

    async def refuse(self, error: Exception) -> None:
        """Say what went wrong, without waiting for a client that doesn't read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                if not self.status:
                    answer = errors.answer(error)
                    await self._all(answer.status, answer.headers, answer.body)
                elif self._streams:
                    await self.end_stream(events=errors.frame(error))

    async def _all(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._head(status, headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        took = (b"openai-processing-ms", str(int((time.perf_counter() - self._began) * 1000)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, took]})
