"""The engine host's server: one thread, one request at a time, and the children that it reaps.

It owns the listening socket, its clients' connections and the table of engines that it has started. A client that goes
away, sends rubbish or doesn't read loses its connection and nothing else. There is no thread and no event loop, since
the process must be able to fork at any moment; requests are answered in well under the time that a fork takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engines.host import group
from engines.host.layout import Layout
from engines.host.protocol import MAX_LINE, StartOrder, decode, encode, parse_start

_SEND_TIMEOUT_S = 1.0
_REMEMBERED = 10_000
"""How many dead engines' exit statuses are kept."""

log = logging.getLogger("greenroom.host")


class Starter(Protocol):
    """How engines are started: forked or spawned."""

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:
        """The pid of the new leader; `leave` closes in a forked child what the server holds. `OSError` if it can't."""
        ...

    def describe(self) -> dict[str, Any]:
        """`mode`, `vllm` and `gate` of the reply to hello."""
        ...


@dataclass
class _Child:
    engine: str
    pid: int
    pid_start: int


@dataclass
class _Client:
    connection: socket.socket
    buffer: bytearray = field(default_factory=bytearray)


class Server:
    """Answers requests until SIGTERM or SIGINT; engines live on after it."""

    def __init__(self, path: Path, starter: Starter) -> None:
        self._path = path
        self._starter = starter
        self._epoch = 0
        self._children: dict[int, _Child] = {}
        self._exits: dict[str, int] = {}
        self._clients: dict[int, _Client] = {}
        self._ending = False
        # poll, not epoll: a forked child that closes an epoll's descriptors would change the parent's set.
        self._selector = selectors.PollSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._listener = _listen(path)

    def run(self) -> None:
        """Serve; returns when told to end by a signal."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        log.info("listening on %s", self._path)
        self._reap()
        while not self._ending:
            for key, _ in self._selector.select():
                key.data()
        self._path.unlink(missing_ok=True)

    def leave(self) -> None:
        """In a forked child: close everything that is the server's, and leave its socket's path alone."""
        for client in self._clients.values():
            client.connection.close()
        for held in (self._listener, self._wake_read, self._wake_write):
            held.close()
        self._selector.close()

    def _end(self, *_: object) -> None:
        self._ending = True

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        self._reap()

    def _reap(self) -> None:
        """Collect every dead child, engines' adopted orphans among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if child := self._children.pop(pid, None):
                code = os.waitstatus_to_exitcode(status)
                self._exits[child.engine] = code
                if len(self._exits) > _REMEMBERED:
                    del self._exits[next(iter(self._exits))]
                log.info("engine %s (pid %d) ended with %d", child.engine, pid, code)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.warning("can't accept a connection: %s", error)
            return
        connection.settimeout(_SEND_TIMEOUT_S)
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(client))

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        self._selector.unregister(client.connection)
        client.connection.close()

    def _read(self, client: _Client) -> None:
        try:
            data = client.connection.recv(65_536)
            if not data:
                self._drop(client)
                return
            client.buffer += data
            while (end := client.buffer.find(b"\n")) >= 0:
                line = bytes(client.buffer[:end])
                del client.buffer[: end + 1]
                client.connection.sendall(encode(self._answer(line)))
            if len(client.buffer) > MAX_LINE:
                self._drop(client)
        except OSError:
            self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            message = decode(line)
            operation = _OPERATIONS.get(str(message.get("op")))
            if operation is None:
                return _refusal("bad_request", f"unknown op; one of {', '.join(_OPERATIONS)}")
            return operation(self, message)
        except (ValueError, RecursionError) as error:
            return _refusal("bad_request", str(error))
        except Exception as error:  # (whatever it was, the host must go on)
            log.exception("a request could not be answered")
            return _refusal("fork_failed", f"{type(error).__name__}: {error}")

    def _hello(self, message: dict[str, Any]) -> dict[str, Any]:
        self._epoch = max(self._epoch, _integer(message, "epoch"))
        return {"ok": True, "pid": os.getpid(), **self._starter.describe()}

    def _start(self, message: dict[str, Any]) -> dict[str, Any]:
        order = parse_start(message)
        epoch = _integer(message, "epoch")
        if epoch < self._epoch:
            return _refusal("stale_epoch", f"epoch {epoch} is over, the host has seen {self._epoch}")
        self._epoch = epoch
        self._reap()
        for child in self._children.values():
            if child.engine == order.engine:  # a repeated order, for a reply that was lost
                return {"ok": True, "pid": child.pid, "pid_start": child.pid_start}
        try:
            Layout.of(order).make()
            pid = self._starter.start(order, self.leave)
        except OSError as error:
            return _refusal("fork_failed", f"{type(error).__name__}: {error}")
        # An unreaped child keeps its pid, so its start time can be read even if it has died already.
        pid_start = group.start_time(pid) or 0
        self._exits.pop(order.engine, None)
        self._children[pid] = _Child(order.engine, pid, pid_start)
        log.info("engine %s started as pid %d", order.engine, pid)
        return {"ok": True, "pid": pid, "pid_start": pid_start}

    def _list(self, _message: dict[str, Any]) -> dict[str, Any]:
        self._reap()
        return {
            "ok": True,
            "engines": {
                child.engine: {"pid": child.pid, "pid_start": child.pid_start} for child in self._children.values()
            },
        }

    def _exit_status(self, message: dict[str, Any]) -> dict[str, Any]:
        self._reap()
        return {"ok": True, "status": self._exits.get(str(message.get("engine")))}


_OPERATIONS: dict[str, Callable[[Server, dict[str, Any]], dict[str, Any]]] = {
    "hello": Server._hello,  # noqa: SLF001
    "start": Server._start,  # noqa: SLF001
    "list": Server._list,  # noqa: SLF001
    "exit_status": Server._exit_status,  # noqa: SLF001
}


def _refusal(code: str, error: str) -> dict[str, Any]:
    return {"ok": False, "error": error, "code": code}


def _integer(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is an integer")
    return value


def _listen(path: Path) -> socket.socket:
    """A listening socket in a directory that only its owner can enter; a path left by an earlier host is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener
