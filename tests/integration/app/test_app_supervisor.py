"""`greenroom up` as a machine and a person treat it; engines are scripted, so nothing here needs vLLM."""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.stores import EmbeddedPostgres
from loadtests.bench import processes
from loadtests.bench.processes import Process
from loadtests.bench.stack import UP, Leftovers, Stack, StackFailed
from tests.conftest import psql

pytestmark = pytest.mark.timeout(120)
SCRIPTED = {"GREENROOM_ENGINE__LAUNCHER": "memory"}


@pytest.fixture
def stack(short_dir: Path) -> Iterator[Stack]:
    """Two gateways, not started yet; whatever the test leaves running is killed."""
    stack = Stack(gateways=2, env=SCRIPTED, directory=short_dir / "a stack")
    yield stack
    stack.stop()
    shutil.rmtree(stack.run_dir, ignore_errors=True)


def refused(stack: Stack, **env: str) -> str:
    """What a start that must fail says on standard error; it is one line."""
    done = subprocess.run(
        UP,
        env=stack.env | env,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def by_role(stack: Stack, role: str) -> list[Process]:
    return [process for process in stack.processes() if process.role == role]


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def killed_at_once(stack: Stack) -> None:
    """Kill the supervisor alone, so that it can do nothing for its children."""
    assert stack._process is not None
    stack._process.kill()
    stack._process.wait()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_i10_a_stopped_up_leaves_nothing(stack: Stack, how: signal.Signals) -> None:
    stack.start()
    roles = sorted({process.role for process in stack.processes()})
    assert roles == ["control", "gateway", "postgres", "up", "valkey"]
    left = stack.stop(how, to_group=False)
    assert left == Leftovers()
    assert stack.exit_code == 0


def test_a_second_up_on_the_same_data_directory_is_refused_and_the_first_goes_on(stack: Stack) -> None:
    stack.start()
    line = refused(stack, GREENROOM_GATEWAY__PORT="0", GREENROOM_GATEWAY__OPERATOR_PORT="0")
    assert line == (
        f"greenroom: the data directory {stack.data_dir} is in use by another greenroom (process {stack.pid})\n"
    )
    assert answers(stack.port)


def test_a_port_in_use_is_refused_and_nothing_is_touched(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", stack.port)):
        line = refused(stack)
    assert line == f"greenroom: can't listen on 127.0.0.1:{stack.port}: address already in use\n"
    assert not stack.data_dir.exists()
    assert not stack.run_dir.exists()


def test_a_database_that_is_not_ours_is_refused_and_not_touched(
    stack: Stack, postgres: EmbeddedPostgres, empty_database: str
) -> None:
    name = empty_database.partition("@/")[2].partition("?")[0]
    psql(postgres, "CREATE TABLE customer (id int)", name)
    line = refused(stack, GREENROOM_DATABASE_URL=empty_database)
    assert "the database has tables but isn't Greenroom's (public.customer)" in line
    assert psql(postgres, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == "1"
    assert stack.processes() == []
    assert not stack.run_dir.exists()


def test_a_missing_engine_environment_is_refused_and_says_what_to_do(stack: Stack) -> None:
    line = refused(stack, GREENROOM_ENGINE__LAUNCHER="local", GREENROOM_ENGINE__PYTHON="/nowhere/python")
    assert line == (
        "greenroom: no engine environment in /nowhere/python: run `./dev setup`, or set GREENROOM_ENGINE__PYTHON\n"
    )


def test_a_killed_gateway_is_started_again_and_the_other_serves_meanwhile(stack: Stack) -> None:
    stack.start()
    first = by_role(stack, "gateway")[0]
    processes.kill(first)
    for _ in range(50):
        assert answers(stack.port)
    eventually(lambda: len(by_role(stack, "gateway")) == 2, "a second gateway")
    eventually(lambda: answers(stack.operator_port) and answers(stack.operator_port + 1), "both operators' ports")
    assert first.pid not in [process.pid for process in by_role(stack, "gateway")]
    assert stack.stop() == Leftovers()


@pytest.mark.parametrize("role", ["control", "valkey", "postgres"])
def test_i10_a_killed_process_is_started_again_and_the_stack_is_whole(stack: Stack, role: str) -> None:
    stack.start()
    # Of Postgres' processes, the first started is the server.
    victim = min(by_role(stack, role), key=lambda process: (process.start, process.pid))
    processes.kill(victim)
    eventually(lambda: any(p.start > victim.start for p in by_role(stack, role)), f"another {role}")
    eventually(lambda: admin_answers(stack), "the admin API to answer")  # a new Postgres recovers first
    eventually(stack._ready, "the gateways to be ready")
    stack.admin("POST", "/workspaces", {"name": "acme"})
    assert stack.stop() == Leftovers()


def admin_answers(stack: Stack) -> bool:
    """Whether the admin API can use its database."""
    try:
        stack.admin("GET", "/workspaces")
    except StackFailed:
        return False
    return True


def test_i10_a_killed_supervisor_takes_all_but_engines_with_it_and_the_next_starts_at_once(stack: Stack) -> None:
    stack.start()
    stack.admin("POST", "/workspaces", {"name": "acme"})
    killed_at_once(stack)
    stack.start()
    assert [workspace["name"] for workspace in stack.admin("GET", "/workspaces")["data"]] == ["acme"]
    assert len(by_role(stack, "gateway")) == 2
    assert stack.stop() == Leftovers()


def test_a_signal_while_starting_stops_what_was_started(stack: Stack) -> None:
    stack.directory.mkdir(parents=True)
    with (stack.directory / "log").open("wb") as log:
        with subprocess.Popen(UP, env=stack.env, cwd="/", stdout=log, stderr=log, stdin=subprocess.DEVNULL) as up:
            eventually(stack.run_dir.exists, "the run directory")
            up.send_signal(signal.SIGTERM)
            assert up.wait(30) == 0
    assert stack.processes() == []
    assert not stack.run_dir.exists()


def test_a_second_run_needs_no_new_admin_key_and_shows_none(stack: Stack) -> None:
    stack.start()
    key = stack.admin_key
    eventually(lambda: f"admin key: {key}" in stack.log_path.read_text(), "the admin key to be shown")
    stack.stop()
    stack.log_path.unlink()
    stack.start()
    eventually(lambda: "Ctrl-C stops it" in stack.log_path.read_text(), "the last line")
    assert key not in stack.log_path.read_text()
    assert stack.admin_key == key
    assert (stack.data_dir / "admin-key").stat().st_mode & 0o777 == 0o600
