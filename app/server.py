"""A gateway's two HTTP servers in one event loop, and how they stop.

On SIGTERM or SIGINT the drain begins: holds end at once, new requests are refused, open answers go on until the drain
is over, then they are interrupted and end cleanly. A second signal ends the drain at once. Once nothing is open the
servers stop. Where other gateways listen on the same socket this one stops listening when the drain begins, so that new
requests go to them; alone it goes on, so that callers hear that they should try again.

uvicorn's own signal handling is off, since it would know nothing of the drain nor of the second server.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import errors
from app.drain import Drain
from app.refusal import Refused

MARGIN_S: Final = 5.0
"""Patience with connections that don't end, once nothing is open any more."""
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


async def serve(apps: Sequence[tuple[Litestar, socket.socket]], drain: Drain, *, alone: bool = True) -> None:
    """Serve until a signal, then drain; returns when every connection is closed. See `run`."""

    def asked() -> None:
        if drain.began:
            drain.hurry()
        drain.begin()

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, asked)
    await run(apps, drain, alone=alone)


async def run(apps: Sequence[tuple[Litestar, socket.socket]], drain: Drain, *, alone: bool = True) -> None:
    """Serve until `drain` begins and nothing is open any more. The listening sockets become the servers'.

    `alone`: nobody else listens on the first, so what comes to it is for this process to refuse.
    """
    servers = [_Server(_config(app)) for app, _ in apps]
    async with asyncio.TaskGroup() as group:
        for server, (_, listener) in zip(servers, apps, strict=True):
            group.create_task(server.serve(sockets=[listener]))
        await drain.until_begun()
        if not alone:
            for listening in servers[0].servers if servers[0].started else ():
                listening.close()
        await drain.until_idle()
        for server in servers:
            server.should_exit = True


class _Protocol(HttpToolsProtocol):
    """What is no HTTP is refused in the same shape as everything else."""

    def send_400_response(self, msg: str) -> None:
        answer = errors.answer(errors.RequestInvalid(msg))
        headers = [*self.server_state.default_headers, *answer.headers, (b"connection", b"close")]
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", answer.body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


def _config(app: Litestar) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(MARGIN_S),
        backlog=_BACKLOG,
    )
