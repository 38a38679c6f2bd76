"""Process groups as `/proc` shows them; standard library only, imported by Greenroom's and by the engine environment.

An engine is a session and process group whose id is the pid of its leader. A pid alone proves nothing, since pids are
used again, so everything here takes the leader's start time as well (`/proc/PID/stat` field 22, ticks since boot).
While any process is left in a group the kernel gives its number to nobody else, so a group whose leader has died can
still be named by it. Zombies don't count: a leader that nobody has reaped yet is gone as far as memory is concerned.
But one of whose threads some still live does; those end a moment later, and hold memory and sockets until then.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

_ENDED = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    group: int
    session: int
    threads: int
    start: int

    @property
    def living(self) -> bool:
        return self.state not in _ENDED or self.threads > 1


def _stat(pid: int | str) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in the second field may hold spaces and brackets; the fields that we want come after its last bracket.
    fields = text[text.rindex(")") + 2 :].split()
    group, session, threads, start = (int(fields[at]) for at in (2, 3, 17, 19))
    return _Stat(state=fields[0], group=group, session=session, threads=threads, start=start)


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; `None` if there is no such process."""
    stat = _stat(pid)
    return stat.start if stat else None


def alive(pid: int, pid_start: int) -> bool:
    """Whether the very process is there and not a zombie."""
    stat = _stat(pid)
    return stat is not None and stat.start == pid_start and stat.living


def members(pid: int) -> tuple[int, ...]:
    """Living (non-zombie) processes whose session or process group is `pid`, the leader among them, in order."""
    names = os.listdir("/proc")  # noqa: PTH208 (names, thousands of them; no Path objects)
    return tuple(sorted(int(name) for name in names if name.isdigit() and _belongs(_stat(name), pid)))


def _belongs(stat: _Stat | None, pid: int) -> bool:
    return stat is not None and pid in (stat.group, stat.session) and stat.living


def terminate(pid: int, pid_start: int) -> bool:
    """Send SIGTERM to the leader, which ends its children in order; `False` if it is gone or not the one meant."""
    return alive(pid, pid_start) and _signal(pid, signal.SIGTERM)


def kill(pid: int, pid_start: int) -> tuple[int, ...]:
    """Send SIGKILL to every member of the group; returns whom. Nobody, if the pid is another process's by now."""
    leader = _stat(pid)
    if leader is not None and leader.start != pid_start:
        return ()
    return tuple(member for member in members(pid) if _signal(member, signal.SIGKILL))


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
