"""Engines forked by a real host: what they are as processes, how they end, and what they leave."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_host import ARGV, SCRIPT, RealHost, RunningEngine, eventually, order

from engines.host import group
from engines.host.protocol import start_request

pytestmark = pytest.mark.vllm

HEAVY = ("vllm", "torch", "transformers", "tokenizers", "xgrammar", "fastapi", "pydantic", "numpy", "uvicorn", "zmq")
IMPORTED_LATE = {
    "transformers_modules": "code from a model's folder: looked for, never there",
}
"""Heavy modules that an engine may import after the fork, and why."""

Begin = Callable[..., RunningEngine]
CHAT = "/v1/chat/completions"
STORY = {"messages": [{"role": "user", "content": "Write a long story."}], "max_tokens": 400, "ignore_eos": True}


def test_hello_says_that_engines_are_forked(host: RealHost) -> None:
    answer = host.request("hello", epoch=1)
    version = answer.pop("vllm")
    assert answer == {"ok": True, "mode": "fork", "gate": None, "pid": host.process.pid}
    assert version.startswith("0.")


def test_the_host_knows_its_engines(host: RealHost, engine: RunningEngine) -> None:
    assert host.request("list")["engines"][engine.order.engine] == {"pid": engine.pid, "pid_start": engine.pid_start}
    assert engine.pid_start == group.start_time(engine.pid)
    assert host.request("exit_status", engine=engine.order.engine) == {"ok": True, "status": None}


def test_a_repeated_order_starts_nothing(host: RealHost, engine: RunningEngine) -> None:
    assert host.ask(start_request(engine.order)) == {"ok": True, "pid": engine.pid, "pid_start": engine.pid_start}


def test_phases_are_stamped_in_their_order(engine: RunningEngine) -> None:
    names, times = zip(*engine.phases(), strict=True)
    assert names == ("fork", "config", "weights", "init", "listening")
    assert list(times) == sorted(times)
    assert 0 < times[-1] - times[0] < 60_000_000


def test_an_engine_is_a_session_of_two_processes_that_holds_nothing_of_the_host(
    host: RealHost, engine: RunningEngine
) -> None:
    assert group.members(engine.pid) == (engine.pid, engine.core)
    assert os.getsid(engine.pid) == os.getsid(engine.core) == engine.pid
    hosts = descriptors(host.process.pid).values()
    for pid in (engine.pid, engine.core):
        held = descriptors(pid)
        assert (held[0], held[1], held[2]) == ("/dev/null", str(engine.files.log), str(engine.files.log))
        assert not {path for path in held.values() if "socket:" in path} & set(hosts)
        assert str(host.path.with_suffix(".lock")) not in held.values()
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
        assert re.search(r"Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text())


def test_i11_an_engine_listens_on_loopback_alone(engine: RunningEngine) -> None:
    addresses = set(listening(engine.pid)) | set(listening(engine.core))
    assert addresses <= {"127.0.0.1", "::1"}


def test_nobody_else_can_reach_the_sockets(host: RealHost, engine: RunningEngine) -> None:
    for directory in (host.path.parent, engine.files.run, engine.files.directory, engine.files.temporary):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory


def test_an_engine_imports_nothing_heavy_after_the_fork(host: RealHost, engine: RunningEngine, ground: Path) -> None:
    message = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for fields in (
        {},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": schema}}], "tool_choice": "none"},
    ):
        engine.ask(CHAT, "imports", **message, **fields)
    engine.ask("/v1/completions", "imports", prompt="Hello", max_tokens=4)
    noted = [line.split() for line in (ground / "imports").read_text().splitlines()]
    ours = {str(engine.pid), str(engine.core)}
    late = {name for pid, name in noted if pid in ours and name.startswith(HEAVY)}
    assert late <= set(IMPORTED_LATE), "add these to engines.host.preload"


def test_an_eager_engine_needs_no_compiler(begin: Begin, ground: Path) -> None:
    programs = ground / "programs"
    programs.mkdir()
    (programs / "lscpu").symlink_to(str(shutil.which("lscpu")))  # (vLLM asks it for the CPU's cores)
    engine = begin(env={"PATH": str(programs), "CXX": "no compiler"}).wait_until_listening()
    answer = engine.ask(
        CHAT, "r5", messages=[{"role": "user", "content": "Hello"}], max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert [len(token["top_logprobs"]) for token in answer["choices"][0]["logprobs"]["content"]] == [2, 2]


def test_i10_kill_9_of_the_leader_takes_the_engine_core_along_and_connections_are_refused(begin: Begin) -> None:
    engine = begin().wait_until_listening()
    os.kill(engine.pid, signal.SIGKILL)
    eventually(lambda: not group.members(engine.pid), within_s=2.0)
    with socket.socket(socket.AF_UNIX) as connection, pytest.raises(ConnectionRefusedError):
        connection.connect(str(engine.files.socket))


def test_i10_the_host_reaps_a_dead_engine_whole(begin: Begin, host: RealHost) -> None:
    engine = begin().wait_until_listening()
    core = engine.core
    os.kill(engine.pid, signal.SIGKILL)
    assert host.exit_status(engine) == -signal.SIGKILL
    assert engine.order.engine not in host.request("list")["engines"]
    eventually(lambda: group.start_time(core) is None and group.start_time(engine.pid) is None, within_s=2.0)


def test_a_dead_engine_core_ends_the_engine_and_its_requests_are_entered_as_errors(
    begin: Begin, host: RealHost
) -> None:
    engine = begin().wait_until_listening()
    with engine.post(CHAT, "r1", **STORY, stream=True) as response:
        while b'"content":"' not in response.readline():
            pass
        os.kill(engine.core, signal.SIGKILL)
        assert [entry["reason"] for entry in engine.book("r1")] == ["error"]
    assert host.exit_status(engine) != -signal.SIGKILL
    assert not group.members(engine.pid)
    assert len(engine.book("r1")) == 1


def test_i10_an_engine_has_nothing_outside_its_directories_that_it_could_leave(
    engine: RunningEngine, ground: Path, engine_python: Path
) -> None:
    engine.ask(CHAT, "r2", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    own = (engine.files.run, engine.files.directory, engine_python.parents[1].resolve(), ground / "cache")
    for pid in (engine.pid, engine.core):
        paths = {*descriptors(pid).values(), *mapped(pid), *bound(pid)}
        left = {path for path in paths if not path.endswith(" (deleted)")}
        shared = {path for path in left if path.startswith(("/tmp/", "/dev/shm/", "/var/tmp/"))}
        assert {path for path in shared if not path.startswith(tuple(f"{directory}/" for directory in own))} == set()
    assert any(path.startswith(f"{engine.files.temporary}/") for path in bound(engine.pid))  # ZMQ's are there


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_i10_an_engine_that_is_told_to_end_ends_whole(
    begin: Begin, host: RealHost, number: signal.Signals, status: int
) -> None:
    engine = begin().wait_until_listening()
    os.kill(engine.pid, number)
    assert host.exit_status(engine) == status
    eventually(lambda: not group.members(engine.pid), within_s=2.0)


@pytest.mark.parametrize("after_s", [0.03, 0.06, 0.2, 0.5])
def test_sigterm_ends_an_engine_that_is_starting(begin: Begin, host: RealHost, after_s: float) -> None:
    engine = begin()
    time.sleep(after_s)  # moments of the start-up: arguments, config, the fork of the core, its model
    engine.terminate()
    assert host.exit_status(engine) == -signal.SIGTERM
    eventually(lambda: not group.members(engine.pid), within_s=2.0)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((*ARGV, "--no-such-argument"), "unrecognized arguments: --no-such-argument"),
        ((*ARGV, "--kv-cache-memory-bytes", "4096"), "Engine core initialization failed"),
    ],
)
def test_a_start_that_fails_ends_with_its_reason_in_the_log(
    begin: Begin, host: RealHost, argv: tuple[str, ...], says: str
) -> None:
    engine = begin(argv=argv)
    assert host.exit_status(engine) > 0
    assert not group.members(engine.pid)
    assert says in engine.files.log.read_text()


def test_a_model_that_is_not_there_fails_the_start(begin: Begin, host: RealHost, ground: Path) -> None:
    engine = begin(model_path=str(ground / "no model"))
    assert host.exit_status(engine) > 0
    assert "no model" in engine.files.log.read_text()


def test_an_engine_computes_with_the_threads_of_its_order(begin: Begin) -> None:
    counts = []
    for threads in (1, 2):
        engine = begin(threads=threads).wait_until_listening()
        engine.ask(CHAT, "threads", messages=[{"role": "user", "content": "Hello there, how are you?"}], max_tokens=4)
        counts.append(sum(1 for _ in Path(f"/proc/{engine.core}/task").iterdir()))
        engine.kill()
    assert counts[1] == counts[0] + 1


def test_two_engines_share_no_random_numbers_or_names(begin: Begin, engine: RunningEngine) -> None:
    other = begin().wait_until_listening()
    names = [
        each.ask("/v1/completions", "same", prompt="Hello", max_tokens=1) and each.book("same")[0]["engine_request_id"]
        for each in (engine, other)
    ]
    assert names[0] != names[1]


def test_i10_engines_serve_on_when_their_host_is_killed_and_the_next_host_starts_more(
    engine_python: Path, ground: Path, demo_model: Path, gone: contextlib.ExitStack
) -> None:
    directory = ground / "second"
    directory.mkdir(mode=0o755)
    command = [engine_python, SCRIPT, "--cache", ground / "cache"]
    first = RealHost(command, directory / "host.sock", log=ground / "second.log")
    engine = first.start(order(demo_model, directory))
    gone.callback(engine.kill)
    engine.wait_until_listening()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with engine.post(CHAT, "r3", **STORY, stream=True) as response:
        response.readline()
        first.end(signal.SIGKILL)
        while b'"content":"' not in response.readline():
            pass
    answer = engine.ask(CHAT, "r4", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    assert answer["usage"]["completion_tokens"] > 0
    second = RealHost([*command, "--mode", "spawn"], directory / "host.sock", log=ground / "second.log")
    assert second.request("list")["engines"] == {}
    assert group.alive(engine.pid, engine.pid_start)
    second.end()


@pytest.fixture
def gone() -> Iterator[contextlib.ExitStack]:
    """What a test hands to it is done when the test has ended, however it did."""
    with contextlib.ExitStack() as stack:
        yield stack


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(path.name)] = str(path.readlink())
    return found


def listening(pid: int) -> Iterator[str]:
    """The addresses of the process's listening TCP sockets."""
    inodes = {path[8:-1] for path in descriptors(pid).values() if path.startswith("socket:[")}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                packed = bytes.fromhex(fields[1].partition(":")[0])
                words = [packed[at : at + 4][::-1] for at in range(0, len(packed), 4)]
                yield socket.inet_ntop(family, b"".join(words))


def mapped(pid: int) -> set[str]:
    """Paths of the files that the process has in its memory."""
    lines = (line.split(None, 5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {fields[5] for fields in lines if len(fields) == 6}


def bound(pid: int) -> set[str]:
    """Paths of the process's Unix sockets."""
    inodes = {path[8:-1] for path in descriptors(pid).values() if path.startswith("socket:[")}
    lines = (line.split(None, 7) for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:])
    return {fields[7] for fields in lines if len(fields) == 8 and fields[6] in inodes}
