"""An engine host for tests: the real server and protocol, but engines that are small scripted programs.

Run as a program: `python tests/fake_host.py SOCKET`. What an engine does is in `behave.json` in its model's folder:

    phase_s         seconds that each phase of the start takes (0.01)
    stuck_at        the phase after which the start gets nowhere, silently
    chatter_s       before the last phase, seconds of a line of log each 20 ms
    exit_at         the phase after which it ends, with `status` (1)
    health          status of /health (200)
    ignore_term     SIGTERM has no effect on leader and children
    children        how many children that outlive their leader (0)
    runaway         a child that leaves the session, with the log as its output
    shared_memory   names to make and map in /dev/shm, in the leader

`host_once` in the same folder is obeyed once and removed: `die_before_fork`, `die_after_fork`, `fail`.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from engines.host import phases
from engines.host.layout import Layout
from engines.host.protocol import StartOrder
from engines.host.server import Server


class Starter:
    """Forks scripted engines."""

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:
        model = Path(order.model_path)
        once = model / "host_once"
        trick = once.read_text() if once.exists() else ""
        once.unlink(missing_ok=True)
        if trick == "fail":
            raise OSError("out of processes")
        if trick == "die_before_fork":
            os._exit(1)
        pid = os.fork()
        if pid == 0:
            try:
                leave()
                run(order, json.loads((model / "behave.json").read_text()))
            finally:
                os._exit(70)
        if trick == "die_after_fork":
            os._exit(1)
        return pid

    def describe(self) -> dict[str, Any]:
        return {"mode": "fork", "vllm": "0", "gate": None}


def run(order: StartOrder, behave: dict[str, Any]) -> None:
    """Be an engine."""
    layout = Layout.of(order)
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    log = os.open(layout.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.closerange(3, 1024)
    say(f"engine {order.engine} with {' '.join(order.argv)} and {order.env}")
    phases.stamp(layout.phases, phases.FORK)
    if behave.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kept = [share(name) for name in behave.get("shared_memory", ())]
    for _ in range(behave.get("children", 0)):
        child()
    if behave.get("runaway"):
        child(leave_session=True)
    for phase in (phases.CONFIG, phases.WEIGHTS, phases.INIT):
        time.sleep(behave.get("phase_s", 0.01))
        phases.stamp(layout.phases, phase)
        say(f"phase {phase}")
        if behave.get("exit_at") == phase:
            os._exit(behave.get("status", 1))
        if behave.get("stuck_at") == phase:
            signal.pause()
    until = time.monotonic() + behave.get("chatter_s", 0.0)
    while time.monotonic() < until:
        say("still at it")
        time.sleep(0.02)
    serve(layout, behave.get("health", 200))
    del kept


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def share(name: str) -> mmap.mmap:
    fd = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4096)
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    return mapped


def child(*, leave_session: bool = False) -> None:
    if os.fork() == 0:
        if leave_session:
            os.setsid()
        while True:
            signal.pause()


def serve(layout: Layout, health: int) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(layout.socket))
    listener.listen()
    phases.stamp(layout.phases, phases.LISTENING)
    while True:
        connection, _ = listener.accept()
        with connection:
            if connection.recv(65_536).startswith(b"GET /health"):
                connection.sendall(f"HTTP/1.1 {health} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())


if __name__ == "__main__":
    Server(Path(sys.argv[1]), Starter()).run()
