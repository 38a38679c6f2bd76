"""Processes as /proc shows them: who they are, what they touch, and what memory they use.

Nothing is cached: every function looks at /proc when it is called, and a process that goes away while it is read is
left out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One process; `start` (clock ticks since boot) tells a reused pid apart."""

    pid: int
    ppid: int
    session: int
    state: str
    start: int
    command: tuple[str, ...]

    @property
    def role(self) -> str:
        """What it is to Greenroom: `up`, `postgres`, `valkey`, `engine host`, `control`, `gateway`, or `other`.

        And `engine`, for each of an engine's processes; the admin API knows which of them are leaders.
        """
        text = " ".join(self.command)
        program = Path(self.command[0]).name if self.command else ""
        if program.startswith("postgres"):
            return "postgres"
        if program.startswith("valkey"):
            return "valkey"
        if "engines/host/__main__.py" in text or text.startswith("greenroom: engine-host"):
            return "engine host"
        if text.startswith("greenroom: engine") or "spawned.py" in text or "vllm" in text.lower():
            return "engine"
        return next((word for word in ("gateway", "control", "up") if word in self.command), "other")

    def __str__(self) -> str:
        return f"{self.pid} ({self.role}, {self.state}): {' '.join(self.command)[:160] or '?'}"


@dataclass(frozen=True)
class Memory:
    """What a process holds, in bytes: `pss` counts a page shared by n processes as 1/n."""

    rss: int = 0
    pss: int = 0
    shared: int = 0
    """Resident pages that at least one other process maps too."""
    private: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.rss + other.rss, self.pss + other.pss, self.shared + other.shared, self.private + other.private
        )


def every() -> Iterator[Process]:
    """All processes that can be read, zombies included."""
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (process := read(int(entry.name))) is not None:
            yield process


def read(pid: int) -> Process | None:
    """One process, `None` if there is none (any more)."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        command = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    return Process(
        pid=pid,
        ppid=int(fields[1]),
        session=int(fields[3]),
        state=fields[0],
        start=int(fields[19]),
        command=tuple(os.fsdecode(part) for part in command.split(b"\0") if part),
    )


def touching(paths: Iterable[Path]) -> list[Process]:
    """Living processes whose environment, command line, working directory or an open file names one of these paths.

    The caller and its ancestors are left out: whoever asks may name the paths itself.
    """
    needles = {os.fsencode(form) for path in paths for form in (path, path.resolve())}
    ours = set(_ancestors(os.getpid()))
    return [
        process
        for process in every()
        if process.pid not in ours and process.state not in "ZX" and _names_one(process.pid, needles)
    ]


def descendants(pid: int) -> list[Process]:
    """The living children of a process, theirs, and so on; not the process itself."""
    everyone = list(every())
    found = {pid}
    while True:
        more = {process.pid for process in everyone if process.ppid in found} - found
        if not more:
            return [process for process in everyone if process.pid in found - {pid} and process.state not in "ZX"]
        found |= more


def memory(pid: int) -> Memory | None:
    """What a process holds now, from `smaps_rollup`; `None` if it is gone or not ours to read."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kilobytes = {name.strip(): int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return Memory(
        rss=kilobytes["Rss"] * 1024,
        pss=kilobytes["Pss"] * 1024,
        shared=(kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"]) * 1024,
        private=(kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) * 1024,
    )


def kill(process: Process, timeout_s: float = 10.0) -> None:
    """SIGKILL, unless it is gone or its pid is another's by now; returns when it runs no more, or is a zombie."""
    end = time.monotonic() + timeout_s
    while (now := read(process.pid)) is not None and now.start == process.start and now.state not in "ZX":
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > end:
            break
        time.sleep(0.01)


def shared_memory() -> frozenset[str]:
    """Names in /dev/shm."""
    return frozenset(entry.name for entry in SHM.iterdir()) if SHM.is_dir() else frozenset()


def mapped_shared_memory(pid: int) -> frozenset[str]:
    """Names in /dev/shm that a process has mapped."""
    try:
        lines = (PROC / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return frozenset()
    paths = (line.split(maxsplit=5)[5] for line in lines if f" {SHM}/" in line)
    return frozenset(Path(path).name for path in paths if not path.endswith("(deleted)"))


def unheld_shared_memory(names: Iterable[str]) -> list[str]:
    """Those of the names in /dev/shm that still exist and that no living process has mapped or open.

    By inode: the C library makes a semaphore under another name, which the kernel goes on showing as a deleted file's.
    """
    left = {}
    for name in names:
        with contextlib.suppress(OSError):
            left[(SHM / name).stat().st_ino] = name
    for process in every():
        if not left:
            break
        for inode in _shared_inodes(process.pid):
            left.pop(inode, None)
    return sorted(left.values())


def _shared_inodes(pid: int) -> Iterator[int]:
    """Inodes in /dev/shm of what a process has mapped and open."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "maps").read_text().splitlines():
            if f" {SHM}/" in line:
                yield int(line.split(maxsplit=5)[4])
    with contextlib.suppress(OSError):
        for descriptor in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()).startswith(f"{SHM}/"):
                    yield descriptor.stat().st_ino


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 0:
        yield pid
        process = read(pid)
        pid = process.ppid if process else 0


def _names_one(pid: int, needles: Iterable[bytes]) -> bool:
    return any(needle in text for text in _texts(pid, ("environ", "cmdline")) for needle in needles)


def _texts(pid: int, files: Sequence[str]) -> Iterator[bytes]:
    """Contents of some files of a process, its working directory and the paths of its open files."""
    home = PROC / str(pid)
    for name in files:
        try:
            yield (home / name).read_bytes()
        except OSError:
            continue
    try:
        links = [home / "cwd", *(home / "fd").iterdir()]
    except OSError:
        return
    for link in links:
        try:
            yield os.fsencode(link.readlink())
        except OSError:
            continue
