"""Who owns a directory, and who dies with whom.

A `DirectoryLock` is a `flock` on an open file: it goes when the last process that inherited it has gone, so a lock that
children inherit says "nothing that the owner started is alive". `die_with_parent` ties a child's life to its parent's.
Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from app.refusal import Refused
from engines.host import group

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up once: nothing may be loaded between fork and exec


class AlreadyOwned(Refused):
    """Another living process owns the directory; the message is one line that names both."""


class DirectoryLock:
    """The right to be the only owner of a directory, held from `acquire` until `release` or the holders' death."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._fd: int | None = None

    def acquire(self, *, orphans_s: float = 15.0, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock. Raises `AlreadyOwned` at once while its owner lives.

        If the owner is dead but its children still hold the lock (they are going), waits up to `orphans_s` seconds.
        """
        waiting = False
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up = time.monotonic() + orphans_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = _parse(os.pread(fd, 64, 0))
                if (owner and group.alive(*owner)) or time.monotonic() > give_up:
                    os.close(fd)
                    by = f" (process {owner[0]})" if owner else ""
                    raise AlreadyOwned(f"{self._what} is in use by another greenroom{by}") from None
                if not waiting:
                    say(f"{self._what} was left by a process that is gone; waiting for its children to end")
                    waiting = True
                time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {group.start_time(os.getpid())}\n".encode(), 0)
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor, for children that are to hold the lock as well (`pass_fds`)."""
        if self._fd is None:
            raise AlreadyOwned(f"{self._what} is not locked")
        return self._fd

    def release(self) -> None:
        """Let go; children that inherited the lock hold it until they exit."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)  # we own it no more: who comes next waits for our children, as if we were dead
            os.close(self._fd)
            self._fd = None


def _parse(text: bytes) -> tuple[int, int] | None:
    with contextlib.suppress(ValueError):
        pid, start = text.split()
        return int(pid), int(start)
    return None


def die_with_parent(sig: signal.Signals = signal.SIGTERM, parent: int | None = None) -> None:
    """Have the kernel send `sig` to this process when the thread that started it dies.

    With `parent` (its pid), sends it at once if that one is already gone.
    """
    _prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), sig)


def dying_with_parent(sig: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` for `Popen` that calls `die_with_parent`; for single-threaded parents.

    It runs after `user=`/`group=` have been applied, which matters: a change of credentials clears the setting.
    """
    parent = os.getpid()
    return lambda: die_with_parent(sig, parent)


def become_subreaper() -> None:
    """Be the parent of orphaned descendants, so that they can be reaped here and not linger as zombies elsewhere."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
