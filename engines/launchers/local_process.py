"""The end of a process that isn't ours to wait for, as an event: by pidfd, which works for any process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

from engines.host import group


@contextlib.contextmanager
def process_end(pid: int, pid_start: int) -> Iterator[asyncio.Event]:
    """An event that is set when the very process has ended, reaped or not; at once if it has already."""
    ended = asyncio.Event()
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        ended.set()
        yield ended
        return
    loop = asyncio.get_running_loop()

    def readable() -> None:
        loop.remove_reader(descriptor)
        ended.set()

    try:
        # Looked at after the opening: if the pid is another's by now, so is the descriptor.
        if group.alive(pid, pid_start):
            loop.add_reader(descriptor, readable)
        else:
            ended.set()
        yield ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
