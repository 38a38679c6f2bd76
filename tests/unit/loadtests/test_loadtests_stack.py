"""`Stack` against small stand-ins for `greenroom up` that misbehave in one way each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtests.bench import processes
from loadtests.bench.stack import LeftBehind, Leftovers, Stack, StackFailed

UP = r"""
import os, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

fault = sys.argv[1]
if fault == "dies":
    sys.exit("port 8000 is in use")

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass

run_dir = Path(os.environ["GREENROOM_RUN_DIR"])
run_dir.mkdir(mode=0o700)
operators = int(os.environ["GREENROOM_GATEWAY__OPERATOR_PORT"])
servers = [HTTPServer(("127.0.0.1", operators + n), Ready) for n in range(int(os.environ["GREENROOM_GATEWAY__COUNT"]))]
if fault == "orphan":
    subprocess.Popen(["sleep", "600"], start_new_session=True)
if fault == "litter":
    Path("/dev/shm/greenroom-test-" + run_dir.name).write_text("x")
if fault == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.pause()
except KeyboardInterrupt:
    pass
if fault != "run-dir":
    run_dir.rmdir()
"""


def make_stack(tmp_path: Path, fault: str = "none", *, gateways: int = 1, stop_timeout_s: float = 30.0) -> Stack:
    program = tmp_path / "stand_in.py"
    program.write_text(UP)
    return Stack(
        gateways=gateways,
        directory=tmp_path / "a stack",
        env={"GREENROOM_ENGINE__LAUNCHER": "memory"},
        up=[sys.executable, str(program), fault],
        stop_timeout_s=stop_timeout_s,
        settle_s=0.3,
    )


def test_a_stack_that_cleans_up_leaves_nothing(tmp_path: Path) -> None:
    with make_stack(tmp_path, gateways=2) as stack:
        assert stack.pid in [process.pid for process in stack.processes()]
        assert stack.operator_url(1).endswith(str(stack.operator_port + 1))
    assert stack.exit_code == 0
    assert stack.processes() == []


def test_a_process_that_outlives_the_stack_is_named_and_killed(tmp_path: Path) -> None:
    with pytest.raises(LeftBehind, match="sleep 600"):
        with make_stack(tmp_path, "orphan") as stack:
            pass
    assert stack.processes() == []


def test_a_run_directory_that_stays_is_named(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, "run-dir").start()
    left = stack.stop()
    stack.run_dir.rmdir()
    assert left == Leftovers(run_dir=(stack.run_dir,))


def test_shared_memory_that_nobody_holds_is_named(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, "litter").start()
    left = stack.stop()
    name = f"greenroom-test-{stack.run_dir.name}"
    (Path("/dev/shm") / name).unlink()
    assert name in left.shared_memory


def test_a_supervisor_that_does_not_stop_is_late_and_killed(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, "deaf", stop_timeout_s=0.3).start()
    left = stack.stop()
    stack.run_dir.rmdir()
    assert left.late_s == 0.3
    assert stack.pid in [process.pid for process in left.processes]
    assert processes.read(stack.pid) is None


def test_a_supervisor_that_dies_at_once_fails_the_start_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(StackFailed, match="port 8000 is in use"):
        make_stack(tmp_path, "dies").start()


def test_an_error_in_the_block_is_kept_and_what_was_left_becomes_a_note(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        with make_stack(tmp_path, "orphan"):
            raise ZeroDivisionError
    assert any("sleep 600" in note for note in caught.value.__notes__)


def test_a_killed_supervisor_can_be_started_again_on_the_same_data(tmp_path: Path) -> None:
    stack = make_stack(tmp_path).start()
    os.kill(stack.pid, signal.SIGKILL)
    left = stack.stop()
    assert left.run_dir == (stack.run_dir,)
    stack.run_dir.rmdir()
    with stack:
        assert stack.exit_code is None
    assert stack.exit_code == 0


def test_processes_are_found_by_working_directory_environment_argument_and_open_file(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    sleep = ["sleep", "600"]
    with (place / "file").open("w") as file:
        started = [
            subprocess.Popen(sleep, cwd=place),
            subprocess.Popen(sleep, env=os.environ | {"PLACE": str(place)}),
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(place)]),
            subprocess.Popen(sleep, stdout=file),
        ]
    stranger = subprocess.Popen(sleep)
    try:
        assert {process.pid for process in processes.touching([place])} == {child.pid for child in started}
    finally:
        for child in [*started, stranger]:
            child.kill()
            child.wait()


def test_the_memory_of_a_process_adds_up() -> None:
    memory = processes.memory(os.getpid())
    assert memory is not None
    assert memory.rss == memory.shared + memory.private
    assert memory.private <= memory.pss <= memory.rss
    assert memory + memory == processes.Memory(2 * memory.rss, 2 * memory.pss, 2 * memory.shared, 2 * memory.private)


def test_a_zombie_is_not_a_descendant() -> None:
    child = subprocess.Popen(["true"])
    end = time.monotonic() + 10
    while (seen := processes.read(child.pid)) is not None and seen.state != "Z":
        assert time.monotonic() < end
    assert child.pid not in [process.pid for process in processes.descendants(os.getpid())]
    child.wait()
