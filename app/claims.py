"""What one `greenroom up` must have for itself: the data directory, the tenants' port, the run directory.

Claimed in an order in which a refusal leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import structs

from app.ownership import DirectoryLock
from app.refusal import Refused
from app.settings import GatewaySettings, Settings

BACKLOG: Final = 2048
OURS: Final = frozenset({"e", "pg", "host.sock", "host.lock", "valkey.sock", "valkey.log"})
"""What the run directory holds; nothing else there is ever removed."""


class ClaimRefused(Refused):
    """Something is taken or can't be made; the message is one line. Nothing was touched."""


class Claim:
    """The claimed things, until `release`."""

    def __init__(self, settings: Settings, lock: DirectoryLock, listener: socket.socket) -> None:
        self.settings = settings
        """With real port numbers where 0 was asked for."""
        self.lock = lock
        self.listener = listener

    def release(self) -> None:
        """Give them back; of the run directory what is ours is removed, and the directory if nothing else is in it."""
        self.listener.close()
        _clear_run_dir(self.settings.run_path)
        self.lock.release()


def claim(settings: Settings, say: Callable[[str], None]) -> Claim:
    """Claim all of it. Raises `ClaimRefused` or `AlreadyOwned`."""
    data = settings.data_path
    lock = DirectoryLock(data / "lock", f"the data directory {data}")
    with contextlib.ExitStack() as undo:
        if data.is_dir():
            lock.acquire(orphans_s=settings.gateway.drain_s + 15.0, say=say)
            undo.callback(lock.release)
        ports, listener = _bind(settings.gateway)
        undo.callback(listener.close)
        if not data.is_dir():
            _make_private(data)
            lock.acquire()
            undo.callback(lock.release)
        (data / "logs").mkdir(mode=0o700, exist_ok=True)
        _make_run_dir(settings.run_path)
        undo.pop_all()
    return Claim(structs.replace(settings, gateway=ports), lock, listener)


def _bind(gateway: GatewaySettings) -> tuple[GatewaySettings, socket.socket]:
    """The tenants' socket, and the settings with the ports in use; operators' ports are only looked at."""
    first = gateway.operator_port
    if first:
        for port in range(first, first + gateway.count):
            _listen(gateway.operator_host, port).close()
    else:
        first = _free_run(gateway.operator_host, gateway.count)
    listener = _listen(gateway.host, gateway.port)
    return structs.replace(gateway, port=listener.getsockname()[1], operator_port=first), listener


def _free_run(host: str, count: int) -> int:
    for _ in range(100):
        first = random.randrange(20_000, 32_768 - count)  # noqa: S311 (below the ports of outgoing connections)
        with contextlib.suppress(ClaimRefused):
            for port in range(first, first + count):
                _listen(host, port).close()
            return first
    raise ClaimRefused(f"found no {count} free ports in a row on {host}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ClaimRefused(f"can't listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}") from None


def _make_private(data: Path) -> None:
    """Root's is open to pass through, since Postgres runs as `nobody` then; the secrets in it are 0600."""
    try:
        data.mkdir(mode=0o700 if os.geteuid() else 0o711, parents=True)
    except OSError as error:
        raise ClaimRefused(f"can't make the data directory {data}: {error.strerror}") from None


def _make_run_dir(path: Path) -> None:
    """Make the directory for sockets, ours alone. What an earlier `up` left of engines that live on stays."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ClaimRefused(f"can't make the run directory {path}: {error.strerror}") from None
    stat = path.lstat()
    if path.is_symlink() or stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
        raise ClaimRefused(f"the run directory {path} is not ours alone: remove it, or set GREENROOM_RUN_DIR")
    strange = sorted(entry.name for entry in path.iterdir() if entry.name not in OURS)
    if strange:
        raise ClaimRefused(f"the run directory {path} is used for other things ({strange[0]}): set GREENROOM_RUN_DIR")


def _clear_run_dir(path: Path) -> None:
    for name in OURS:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
