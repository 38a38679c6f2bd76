"""A gateway's two HTTP servers in one event loop, and how they stop.

On SIGTERM or SIGINT the drain begins and both stop listening: holds end at once, open answers go on until the drain is
over, then they are interrupted and end cleanly. A second signal ends the drain at once. uvicorn's own signal handling
is off, since it would know nothing of the second server.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from litestar import Litestar

from app.drain import Drain
from app.refusal import Refused

MARGIN_S: Final = 5.0
"""Between the end of a drain and the end of the patience with connections that don't end."""
_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 75


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `Refused` in one line if the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Refused(f"can't listen on {host}:{port}: {error.strerror}") from None
    return listener


async def serve(apps: list[tuple[Litestar, socket.socket]], drain: Drain, *, drain_s: float) -> None:
    """Serve until a signal, then drain; returns when every connection is closed. Sockets become the servers'."""
    servers = [_Server(_config(app, drain_s)) for app, _ in apps]

    def asked() -> None:
        if drain.began:
            drain.hurry()
        drain.begin()
        for server in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, asked)
    async with asyncio.TaskGroup() as group:
        for server, (_, listener) in zip(servers, apps, strict=True):
            group.create_task(server.serve(sockets=[listener]))


def _config(app: Litestar, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_s + MARGIN_S) + 1,
        backlog=_BACKLOG,
    )
