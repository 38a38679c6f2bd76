"""Process groups, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from engines.host import group

FAMILY = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
other = subprocess.Popen(["sleep", "600"], process_group=0)
print(child.pid, other.pid, flush=True)
sys.stdin.read()
"""
THREADED = """
import ctypes, os, threading
threading.Thread(target=ctypes.CDLL(None).pause).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # ends this thread alone
"""


def within(seconds: float, look: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def family() -> Iterator[tuple[int, int, int]]:
    """A session of three: its leader, a child, and a child with a process group of its own."""
    leader = subprocess.Popen(
        [sys.executable, "-c", FAMILY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert leader.stdout is not None and leader.stdin is not None
    child, other = map(int, leader.stdout.readline().split())
    yield leader.pid, child, other
    for pid in (leader.pid, child, other):
        if group.start_time(pid) is not None:
            os.kill(pid, signal.SIGKILL)
    leader.stdin.close()
    leader.stdout.close()
    leader.wait()


def test_members_are_those_of_the_session_and_of_the_group(family: tuple[int, int, int]) -> None:
    assert group.members(family[0]) == tuple(sorted(family))
    assert group.members(os.getpid()) in ((), (os.getpid(),))  # a group of this test's runner, or none


def test_a_pid_that_was_used_again_is_another_process(family: tuple[int, int, int]) -> None:
    start = group.start_time(family[0])
    assert start is not None
    assert group.alive(family[0], start)
    assert not group.alive(family[0], start - 1)
    assert not group.terminate(family[0], start - 1)
    assert group.kill(family[0], start - 1) == ()
    assert group.members(family[0]) == tuple(sorted(family))


def test_killing_reaches_every_member_though_the_leader_is_dead_and_not_reaped(family: tuple[int, int, int]) -> None:
    leader, child, other = family
    start = group.start_time(leader)
    assert start is not None
    os.kill(leader, signal.SIGKILL)
    assert within(5, lambda: not group.alive(leader, start))
    assert group.start_time(leader) == start  # a zombie keeps its pid
    assert group.members(leader) == tuple(sorted((child, other)))
    assert group.kill(leader, start) == tuple(sorted((child, other)))
    assert within(5, lambda: group.members(leader) == ())


def test_terminating_signals_the_leader_alone(family: tuple[int, int, int]) -> None:
    leader, child, other = family
    start = group.start_time(leader)
    assert start is not None
    assert group.terminate(leader, start)
    assert within(5, lambda: group.members(leader) == tuple(sorted((child, other))))
    assert not group.terminate(leader, start)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of a system call")
def test_a_process_whose_first_thread_has_ended_lives_as_long_as_another_does() -> None:
    process = subprocess.Popen([sys.executable, "-c", THREADED], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    start = group.start_time(process.pid)
    assert start is not None
    time.sleep(0.05)
    assert group.alive(process.pid, start)
    assert group.members(process.pid) == (process.pid,)
    process.kill()
    process.wait()
    process.stdout.close()
    assert group.members(process.pid) == ()


def test_what_was_never_there_is_not_alive() -> None:
    assert group.start_time(2**22 + 1) is None
    assert not group.alive(2**22 + 1, 1)
    assert group.members(2**22 + 1) == ()
