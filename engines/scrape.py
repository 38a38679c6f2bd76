"""Asks an engine how much it has to do.

The gateways' own counts say what they sent. Before an engine is stopped the engine itself is asked as well, so that the
request of a gateway that died is not cut off.
"""

from __future__ import annotations

from typing import Final

import aiohttp

from engines import prom

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
PATIENCE_S: Final = 2.0


async def in_flight(address: str, *, patience_s: float = PATIENCE_S) -> int | None:
    """Requests that run or wait in the engine at this Unix socket; `None` if it gave no usable answer in time."""
    exposition = await _metrics(address, patience_s)
    if exposition is None:
        return None
    try:
        running, waiting = prom.total(exposition, RUNNING), prom.total(exposition, WAITING)
    except ValueError:
        return None
    return None if running is None or waiting is None else int(running + waiting)


async def _metrics(address: str, patience_s: float) -> str | None:
    timeout = aiohttp.ClientTimeout(total=patience_s)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(address), timeout=timeout) as session:
            async with session.get("http://engine/metrics") as response:
                return await response.text() if response.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
        return None
