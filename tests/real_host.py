"""A real engine host and engines as tests want them: started, asked, and gone afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engines.host import group
from engines.host.layout import Layout
from engines.host.protocol import StartOrder, decode, encode, start_request

SCRIPT = Path(__file__).parents[1] / "engines" / "host" / "__main__.py"
ARGV = (
    *("--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--disable-uvicorn-access-log", "--disable-fastapi-docs", "--load-format", "safetensors"),
)
PATIENCE_S = 90.0

T = TypeVar("T")


def eventually(look: Callable[[], T], within_s: float = PATIENCE_S) -> T:
    """The first true value of `look`; fails if there is none in time."""
    deadline = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not so within {within_s} s"
        time.sleep(0.005)
    return seen


class RealHost:
    """An engine host's process and one connection to it."""

    def __init__(self, command: Sequence[str | Path], socket_path: Path, *, log: Path) -> None:
        self.path = socket_path
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, "--socket", socket_path], stdout=file, stderr=file, env={"PATH": os.environ["PATH"]}
            )
        self._connection: socket.socket | None = None

    def connect(self) -> socket.socket:
        """A new connection, once the host listens."""
        connection = socket.socket(socket.AF_UNIX)

        def attempt() -> bool:
            assert self.process.poll() is None, f"the host ended: {self.log.read_text()}"
            return connection.connect_ex(str(self.path)) == 0

        eventually(attempt)
        return connection

    def ask(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        if self._connection is None:
            self._connection = self.connect()
        self._connection.sendall(line)
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._connection.recv(65_536)
            assert received, "the host closed the connection"
            answer += received
        return decode(answer)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.ask(encode({"op": op, **fields}))

    def start(self, order: StartOrder) -> RunningEngine:
        answer = self.ask(start_request(order))
        assert answer["ok"], answer
        return RunningEngine(order, answer["pid"], answer["pid_start"])

    def exit_status(self, engine: RunningEngine) -> int:
        """How the engine ended, once it has."""
        found: list[int | None] = []

        def ended() -> bool:
            found[:] = [self.request("exit_status", engine=engine.order.engine)["status"]]
            return found[0] is not None

        eventually(ended)
        assert found[0] is not None
        return found[0]

    def end_engines(self) -> None:
        """Kill every engine that the host knows."""
        for engine in self.request("list")["engines"].values():
            group.kill(engine["pid"], engine["pid_start"])

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._connection is not None:
            self._connection.close()
        self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE_S)


def order(model: Path, directory: Path, **changes: Any) -> StartOrder:
    """An order for a new engine whose files are under `directory`."""
    engine = str(uuid.uuid4())
    whole = StartOrder(
        engine=engine,
        epoch=1,
        model_path=str(model),
        served_name="m",
        engine_dir=str(directory / "engines" / engine),
        run_dir=str(directory / "e" / engine[-12:]),
        argv=ARGV,
    )
    return replace(whole, **changes)


@dataclass
class RunningEngine:
    """An engine's process group and its HTTP server."""

    order: StartOrder
    pid: int
    pid_start: int

    @property
    def files(self) -> Layout:
        return Layout.of(self.order)

    @property
    def core(self) -> int:
        """The EngineCore's pid."""
        (core,) = (pid for pid in group.members(self.pid) if pid != self.pid and _name(pid) == "VLLM::EngineCor")
        return core

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.files.socket))
        return connection

    def wait_until_listening(self, within_s: float = PATIENCE_S) -> RunningEngine:
        def listening() -> bool:
            assert group.alive(self.pid, self.pid_start), self.files.log.read_text()[-5000:]
            with socket.socket(socket.AF_UNIX) as connection:
                return connection.connect_ex(str(self.files.socket)) == 0

        eventually(listening, within_s)
        return self

    @contextlib.contextmanager
    def post(self, path: str, request_id: str, **body: Any) -> Iterator[http.client.HTTPResponse]:
        """The response to a request; leaving the block closes the connection, whatever was read."""
        connection = http.client.HTTPConnection("engine", timeout=PATIENCE_S)
        connection.sock = self.connect()
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        connection.request("POST", path, json.dumps({"model": "m", "temperature": 0, **body}), headers)
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, path: str, request_id: str, **body: Any) -> dict[str, Any]:
        """The whole answer; of a stream the last event with usage."""
        with self.post(path, request_id, **body) as response:
            text = response.read().decode()
        assert response.status == http.client.OK, text
        if not body.get("stream"):
            answer: dict[str, Any] = json.loads(text)
            return answer
        events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        return next(event for event in reversed(events) if event.get("usage"))

    def book(self, request_id: str, lines: int = 1) -> list[dict[str, Any]]:
        """What the book says of a request, once it has that many lines."""

        def entries() -> list[dict[str, Any]]:
            entered = map(json.loads, self.files.book.read_text().splitlines())
            return [entry for entry in entered if entry["request_id"] == request_id]

        eventually(lambda: len(entries()) >= lines)
        return entries()

    def gauge(self, name: str) -> float:
        """A value of the engine's /metrics."""
        connection = http.client.HTTPConnection("engine", timeout=PATIENCE_S)
        connection.sock = self.connect()
        connection.request("GET", "/metrics")
        with contextlib.closing(connection):
            lines = connection.getresponse().read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def phases(self) -> list[tuple[str, int]]:
        stamps = map(json.loads, self.files.phases.read_text().splitlines())
        return [(stamp["phase"], stamp["at_us"]) for stamp in stamps]

    def kill(self) -> None:
        """End every process of it, and return when none is left."""
        group.kill(self.pid, self.pid_start)
        eventually(lambda: not group.members(self.pid))

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
