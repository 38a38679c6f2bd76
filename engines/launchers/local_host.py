"""Talks to the engine host of this machine (`engines.host.protocol`): one connection a request, every wait bounded.

The host may be away at any time: it takes some 15 s to import vLLM and may be restarted. Engines don't care, only new
starts do.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from engines.host.protocol import MAX_LINE, decode, encode
from engines.model import EngineId

ANSWER_S: Final = 10.0
"""Longest wait for one answer; a fork takes some 20 ms."""


class HostAway(Exception):
    """The host could not be reached or did not answer. `heard`: it may have got the request and be at it."""

    def __init__(self, message: str, *, heard: bool) -> None:
        super().__init__(message)
        self.heard = heard


class EngineHost:
    """The host behind a socket. Holds no connection, so there is none to lose."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, request: bytes, *, within_s: float = ANSWER_S) -> dict[str, Any]:
        """The host's answer to one request line; `HostAway` if there is none in time."""
        heard = False
        try:
            async with asyncio.timeout(within_s):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=MAX_LINE)
                try:
                    heard = True
                    writer.write(request)
                    return decode(await reader.readuntil(b"\n"))
                finally:
                    writer.close()
        except TimeoutError:
            raise HostAway(f"the engine host gave no answer within {within_s} s", heard=heard) from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise HostAway(f"the engine host at {self._path} is away: {error}", heard=heard) from None

    async def hello(self, epoch: int, *, within_s: float = ANSWER_S) -> dict[str, Any]:
        """Tell the host which epoch leads, so that it refuses older ones; `mode`, `vllm`, `gate` and `pid` of it."""
        return await self.ask(encode({"op": "hello", "epoch": epoch}), within_s=within_s)

    async def engines(self, *, within_s: float = ANSWER_S) -> dict[str, dict[str, int]]:
        """`pid` and `pid_start` of the host's living children, by engine."""
        answer = await self.ask(encode({"op": "list"}), within_s=within_s)
        listed: dict[str, dict[str, int]] = answer.get("engines", {})
        return listed

    async def exit_status(self, engine: EngineId, *, within_s: float = 0.5) -> int | None:
        """How a child ended: exit code, or the negative number of a signal; `None` if the host can't say."""
        try:
            status = (await self.ask(encode({"op": "exit_status", "engine": engine}), within_s=within_s)).get("status")
        except HostAway:
            return None
        return status if isinstance(status, int) else None
