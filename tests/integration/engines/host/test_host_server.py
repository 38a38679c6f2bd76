"""The engine host's server by itself, with Greenroom's own Python: every engine it spawns fails for want of vLLM."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_host import SCRIPT, RealHost, eventually, order

from engines.host import group
from engines.host.protocol import decode, encode, start_request

COMMAND = (sys.executable, SCRIPT, "--mode", "spawn")


@pytest.fixture
def server(short_dir: Path) -> Iterator[RealHost]:
    host = RealHost(COMMAND, short_dir / "run" / "host.sock", log=short_dir / "log")
    yield host
    host.end()


def exchange(connection: socket.socket, sent: bytes) -> dict[str, Any]:
    connection.sendall(sent)
    with connection.makefile("rb") as lines:
        return decode(lines.readline())


def test_hello_names_the_mode(server: RealHost) -> None:
    assert server.request("hello", epoch=1) == {
        "ok": True,
        "mode": "spawn",
        "gate": None,
        "vllm": "none",
        "pid": server.process.pid,
    }


def test_the_directory_of_the_socket_is_closed_to_others(server: RealHost) -> None:
    server.request("list")
    assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


def test_an_engine_that_fails_leaves_its_status_and_its_last_lines(server: RealHost, short_dir: Path) -> None:
    engine = server.start(order(short_dir, short_dir))
    assert server.exit_status(engine) == 1
    assert "ModuleNotFoundError" in engine.files.log.read_text().splitlines()[-1]
    assert [name for name, _ in engine.phases()] == ["fork"]
    assert server.request("list") == {"ok": True, "engines": {}}
    assert group.start_time(engine.pid) is None  # reaped


@pytest.mark.parametrize("said_by", ["hello", "start"])
def test_an_order_of_a_lower_epoch_is_refused(server: RealHost, short_dir: Path, said_by: str) -> None:
    if said_by == "hello":
        server.request("hello", epoch=7)
    else:
        server.start(order(short_dir, short_dir, epoch=7))
    answer = server.ask(start_request(order(short_dir, short_dir, epoch=6)))
    assert (answer["ok"], answer["code"]) == (False, "stale_epoch")
    assert server.ask(start_request(order(short_dir, short_dir, epoch=7)))["ok"]


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish",
        b"[1]",
        b"\xff\xfe",
        b"{}",
        b'{"op":"dance"}',
        b'{"op":["list"]}',
        b'{"op":"hello"}',
        b'{"op":"hello","epoch":"1"}',
        b'{"op":"hello","epoch":true}',
        b'{"op":"start","epoch":1}',
        b"[" * 100_000,
        b'{"op":"start","epoch":1,"engine":"e","model_path":1,"served_name":"m","engine_dir":"/e","run_dir":"/r","argv":[]}',
    ],
)
def test_what_is_no_request_is_answered_and_does_no_harm(server: RealHost, line: bytes) -> None:
    with server.connect() as connection:
        answer = exchange(connection, line + b"\n")
        assert (answer["ok"], answer["code"]) == (False, "bad_request")
        assert exchange(connection, encode({"op": "list"})) == {"ok": True, "engines": {}}


def test_an_order_whose_sockets_would_have_too_long_a_path_is_refused(server: RealHost, short_dir: Path) -> None:
    answer = server.ask(start_request(order(short_dir, short_dir, run_dir=str(short_dir / ("r" * 80)))))
    assert (answer["ok"], answer["code"]) == (False, "bad_request")
    assert "too long" in answer["error"]


def test_an_order_whose_directories_cannot_be_made_is_refused(server: RealHost, short_dir: Path) -> None:
    (short_dir / "file").touch()
    answer = server.ask(start_request(order(short_dir, short_dir, run_dir=str(short_dir / "file" / "e"))))
    assert (answer["ok"], answer["code"]) == (False, "fork_failed")


def test_a_client_that_leaves_in_the_middle_or_sends_without_end_harms_nobody_else(server: RealHost) -> None:
    leaving, endless = server.connect(), server.connect()
    leaving.sendall(b'{"op":"li')
    leaving.close()
    with endless:
        with pytest.raises(OSError):
            for _ in range(100):
                endless.sendall(b"x" * 65_536)
    assert server.request("list")["ok"]


def test_requests_that_come_together_are_answered_in_their_order(server: RealHost) -> None:
    with server.connect() as connection:
        connection.sendall(encode({"op": "hello", "epoch": 1}) + encode({"op": "list"}) + b"x\n")
        with connection.makefile("rb") as lines:
            answers = [decode(lines.readline()) for _ in range(3)]
    assert [min(answer) for answer in answers] == ["gate", "engines", "code"]


def test_a_second_host_of_the_same_socket_gives_way_and_takes_over_from_a_dead_one(short_dir: Path) -> None:
    path = short_dir / "run" / "host.sock"
    first = RealHost(COMMAND, path, log=short_dir / "log")
    first.request("list")
    second = subprocess.run([*COMMAND, "--socket", path], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another engine host has" in second.stderr
    assert first.request("list")["ok"]
    first.end(signal.SIGKILL)
    assert path.exists()
    third = RealHost(COMMAND, path, log=short_dir / "log")
    assert third.request("list")["ok"]
    third.end()
    assert not path.exists()


def test_the_host_reaps_what_its_engines_leave(server: RealHost, short_dir: Path) -> None:
    engines = [server.start(order(short_dir, short_dir)) for _ in range(3)]
    assert [server.exit_status(engine) for engine in engines] == [1, 1, 1]
    eventually(lambda: children(server.process.pid) == [])


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_sigterm_ends_the_host_and_not_its_engines(short_dir: Path) -> None:
    host = RealHost(COMMAND, short_dir / "host.sock", log=short_dir / "log")
    engine = host.start(order(short_dir, short_dir))
    os.kill(engine.pid, signal.SIGSTOP)
    host.end()
    assert host.process.returncode == 0
    assert group.alive(engine.pid, engine.pid_start)
    engine.kill()
