"""The last look before `greenroom up` ends: engines that the controller has not stopped, because it was killed, say.

They are found as the kernel knows them, without files that could be wrong: what descends from this process (a
subreaper) and is not one of the stores, and whoever has a Unix socket below `<run_dir>/e`. Their groups are killed and
what vLLM had made for them in /dev/shm, and nobody has any more, is removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from engines.host import group
from engines.launchers.local_remains import SHARED_MEMORY, shared_memory

PATIENCE_S: Final = 10.0


def sweep(run_path: Path, *, spare: Collection[int], say: Callable[[str], None]) -> tuple[int, ...]:
    """Kill what is left of the engines and return the pids; `spare` are children that go on, with their children.

    Blocks until they are gone, at most `PATIENCE_S` seconds.
    """
    left = {*_descendants(os.getpid(), spare), *_holders(run_path / "e")} - {os.getpid()}
    groups = {leader for pid in left if (leader := _leader(pid))} - {os.getpgid(0)}
    doomed = sorted({member for leader in groups for member in group.members(leader)})
    if not doomed:
        return ()
    say(f"killing {len(doomed)} left-over processes of engines: {', '.join(map(str, doomed))}")
    memory = shared_memory(doomed)
    for leader in groups:
        group.kill(leader, group.start_time(leader) or 0)
    give_up = time.monotonic() + PATIENCE_S
    while any(group.members(leader) for leader in groups) and time.monotonic() < give_up:
        time.sleep(0.01)
    for name in memory - shared_memory(_pids()):
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return tuple(doomed)


def _leader(pid: int) -> int | None:
    """The process group of a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _descendants(pid: int, spare: Collection[int]) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (int(word) for word in (thread / "children").read_text().split()):
                if child not in spare:
                    found += [child, *_descendants(child, spare)]
    return found


def _holders(directory: Path) -> list[int]:
    """Processes that have a Unix socket bound below `directory`."""
    sockets = set()
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and Path(fields[7]).is_relative_to(directory):
            sockets.add(f"socket:[{fields[6]}]")
    return [pid for pid in _pids() if _has_open(pid, sockets)] if sockets else []


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _has_open(pid: int, names: Collection[str]) -> bool:
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(fd.readlink()) in names:
                    return True
    return False
