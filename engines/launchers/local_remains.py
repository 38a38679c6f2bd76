"""Which processes, sockets and shared memory belong to an engine, found from outside, and their removal.

    <run>/e/<installation>-<end of the engine's id>/    runtime directory of one engine
        s, t/        its socket and temporary files
        pid          JSON of `Leader`: who leads its process group
        shm          names in /dev/shm that its processes have had

An engine whose pid nobody wrote down is found by its log: its processes' standard output is `<engines>/<id>/log`.
Only entries of /dev/shm that a process of the engine had open or mapped, that carry a name which vLLM, torch, NCCL or
multiprocessing makes up, and that no living process has any more are removed. Everything here blocks: use a thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from engines.host import group
from engines.host.layout import Layout
from engines.model import EngineId

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 (where the kernel has it)
SHM_PREFIXES: Final = ("psm_", "sem.mp-", "torch_", "nccl-", "vllm_", "VLLM_OBJECT_STORAGE_SHM_BUFFER")
PROC: Final = Path("/proc")


class Leader(Struct, frozen=True, kw_only=True):
    """The first process of an engine."""

    engine: EngineId
    pid: int
    pid_start: int
    asked_us: int | None = None
    """CLOCK_MONOTONIC in microseconds when the host was asked to start it."""


def run_directory(run_path: Path, installation: str, engine: EngineId) -> Path:
    """The runtime directory of an engine; short, for the sockets in it."""
    return run_path / "e" / f"{installation}-{engine[-12:]}"


def write_leader(layout: Layout, leader: Leader) -> None:
    """Note who leads the engine, for a controller to come."""
    file = layout.run / "pid"
    new = file.with_name("pid.new")
    new.write_bytes(msgspec.json.encode(leader))
    new.replace(file)


def read_leader(run: Path) -> Leader | None:
    """Who leads the engine of a runtime directory, if that was noted."""
    try:
        return msgspec.json.decode((run / "pid").read_bytes(), type=Leader)
    except (OSError, msgspec.DecodeError):
        return None


def installed_engines(run_path: Path, installation: str, engines_path: Path) -> dict[Path, EngineId | None]:
    """Runtime directories of an installation, each with its engine if a note or a living process names it."""
    by_end = {engine[-12:]: engine for engine in processes_by_log(engines_path)}
    found: dict[Path, EngineId | None] = {}
    for run in (run_path / "e").glob(f"{installation}-*"):
        leader = read_leader(run)
        found[run] = leader.engine if leader is not None else by_end.get(run.name[-12:])
    return found


def processes_by_log(engines_path: Path) -> dict[EngineId, set[int]]:
    """Living processes whose standard output or error is an engine's log."""
    root = engines_path.resolve()
    found: dict[EngineId, set[int]] = {}
    for pid in _pids():
        for engine in _logs_of(pid, root):
            found.setdefault(engine, set()).add(pid)
    return found


def find_leader(engines_path: Path, engine: EngineId) -> Leader | None:
    """The leader of an engine's session, found by its log; `None` if it is gone or was never there."""
    for pid in processes_by_log(engines_path).get(engine, ()):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == pid and (start := group.start_time(pid)) is not None:
                return Leader(engine=engine, pid=pid, pid_start=start)
    return None


def kill_by_log(engines_path: Path, engine: EngineId) -> int:
    """Send SIGKILL to every living process whose output is the engine's log; how many there were."""
    pids = processes_by_log(engines_path).get(engine, set())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if engine in _logs_of(pid, engines_path.resolve()):  # and not another process of the same number by now
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
    return len(pids)


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm, of those that may be litter, that these processes have open or mapped.

    Compared by inode, not by name: the C library makes a semaphore under another name, which the kernel then goes on
    showing as that of a deleted file.
    """
    inodes = {inode for pid in pids for inode in _shared_inodes(pid)}
    with os.scandir(SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if _may_be_litter(entry.name) and entry.inode() in inodes}


def note_shared_memory(layout: Layout, pids: Iterable[int]) -> None:
    """Add what these processes share to the list of the engine's runtime directory."""
    noted = _noted(layout.run)
    names = shared_memory(pids) | noted
    if names != noted:
        with contextlib.suppress(FileNotFoundError):
            (layout.run / "shm").write_text("\n".join(sorted(names)))


def clean(run: Path) -> None:
    """Remove a runtime directory and the shared memory noted in it. Its processes must be gone."""
    names = {name for name in _noted(run) if (SHARED_MEMORY / name).exists()}
    if names:
        held = shared_memory(_pids())
        for name in names - held:
            with contextlib.suppress(FileNotFoundError):
                (SHARED_MEMORY / name).unlink()
    shutil.rmtree(run, ignore_errors=True)


def _logs_of(pid: int, root: Path) -> set[EngineId]:
    """Engines under `root` whose log is the standard output or error of a process."""
    found = set()
    for stream in ("1", "2"):
        with contextlib.suppress(OSError):
            target = Path(str((PROC / str(pid) / "fd" / stream).readlink()).removesuffix(" (deleted)"))
            if target.name == "log" and target.parent.parent == root:
                found.add(EngineId(target.parent.name))
    return found


def _noted(run: Path) -> set[str]:
    try:
        return {name for name in (run / "shm").read_text().splitlines() if _may_be_litter(name)}
    except FileNotFoundError:
        return set()


def _may_be_litter(name: str) -> bool:
    return name.startswith(SHM_PREFIXES) and "/" not in name


def _pids() -> Iterator[int]:
    for name in os.listdir(PROC):  # noqa: PTH208 (names, thousands of them; no Path objects)
        if name.isdigit():
            yield int(name)


def _shared_inodes(pid: int) -> Iterator[int]:
    """Inodes in /dev/shm of what a process has mapped and open; none for one that is gone or another user's."""
    prefix = f"{SHARED_MEMORY}/"
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
            if prefix in line:
                yield int(line.split(maxsplit=5)[4])
    with contextlib.suppress(OSError):
        for descriptor in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()).startswith(prefix):
                    yield descriptor.stat().st_ino
