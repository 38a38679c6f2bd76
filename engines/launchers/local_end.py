"""Ends an engine of this machine, whatever state its processes are in, and removes what it leaves.

1. SIGTERM to its leader, which ends its children in order; wait for it, up to the grace.
2. SIGKILL to the group, again and again, until no living member is left. There is no time-out here: memory that a
   process still has must not be given to another.
3. SIGKILL to processes that left the group, or whose group nobody knows: those whose output is the engine's log.
4. Its runtime directory and shared memory are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import structlog

from engines.host import group
from engines.host.layout import Layout
from engines.launchers import local_remains
from engines.launchers.local_process import process_end
from engines.launchers.local_remains import Leader
from engines.model import EngineId

FIRST_LOOK_S: Final = 0.005
LONGEST_LOOK_S: Final = 0.1
COMPLAIN_S: Final = 10.0

log = structlog.get_logger()


async def end(layout: Layout, leader: Leader | None, *, grace_s: float) -> None:
    """End the engine of these directories; `leader` is who leads its group, if anybody knows.

    Returns once no process of it is alive, milliseconds after a SIGKILL unless the kernel is stuck.
    """
    if leader is not None:
        await asyncio.to_thread(_note, layout, leader)
        with process_end(leader.pid, leader.pid_start) as ended:
            group.terminate(leader.pid, leader.pid_start)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await ended.wait()
        await _until_gone(leader)
    await _until_nobody_logs(layout)
    await asyncio.to_thread(local_remains.clean, layout.run)


def _note(layout: Layout, leader: Leader) -> None:
    if group.start_time(leader.pid) in {None, leader.pid_start}:
        local_remains.note_shared_memory(layout, group.members(leader.pid))


async def _until_gone(leader: Leader) -> None:
    wait_s, complain_at = FIRST_LOOK_S, time.monotonic() + COMPLAIN_S
    while left := await asyncio.to_thread(group.kill, leader.pid, leader.pid_start):
        if time.monotonic() > complain_at:
            log.error("engine_does_not_die", engine=leader.engine, processes=left)
            complain_at += COMPLAIN_S
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_LOOK_S)


async def _until_nobody_logs(layout: Layout) -> None:
    engines, engine = layout.directory.parent, EngineId(layout.directory.name)
    wait_s = FIRST_LOOK_S
    while await asyncio.to_thread(local_remains.kill_by_log, engines, engine):
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_LOOK_S)
