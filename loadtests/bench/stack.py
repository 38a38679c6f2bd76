"""A whole Greenroom for one benchmark, smoke or end-to-end test: started, asked, stopped, and looked for afterwards.

    with Stack(gateways=2) as stack:
        stack.greenroom("workspaces", "create", "acme")
        chat(stack.url, ...)

`Stack` owns one `greenroom up` with free ports, a data directory and a run directory of its own. Leaving the block
sends SIGINT to its process group, as Ctrl-C in a terminal does, and raises `LeftBehind` if a process, the run directory
or shared memory outlives it. What was left is killed first, so that a failing test harms no other. An error inside the
block is not replaced: what was left becomes a note on it.

Starting again on the same data is allowed: `stop()`, or a kill of the supervisor, then `start()`.
Everything here blocks; asynchronous tests build the stack in a synchronous fixture or a thread.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app import readiness
from app.settings import Settings, load
from loadtests.bench import ports, processes
from loadtests.bench.processes import Process

UP = (sys.executable, "-m", "app", "up")
CLI = (sys.executable, "-m", "app")
MODEL = "bench-model"
DEVICES_S = 30.0


class StackFailed(Exception):
    """The stack did not start, or a command to it failed; the message ends with its last log lines."""


class LeftBehind(Exception):
    """Something outlived the stack; the message lists it."""


@dataclass(frozen=True)
class Leftovers:
    """What a stopped stack has left; false when that is nothing."""

    processes: tuple[Process, ...] = ()
    run_dir: tuple[Path, ...] = ()
    """The run directory and what is in it."""
    shared_memory: tuple[str, ...] = ()
    late_s: float | None = None
    """Set when it did not stop by itself in so many seconds."""

    def __bool__(self) -> bool:
        return bool(self.processes or self.run_dir or self.shared_memory or self.late_s is not None)

    def __str__(self) -> str:
        lines = [f"did not stop within {self.late_s:.0f} s"] if self.late_s is not None else []
        lines += [f"process {process}" for process in self.processes]
        lines += [f"path {path}" for path in self.run_dir]
        lines += [f"shared memory /dev/shm/{name}" for name in self.shared_memory]
        return "left behind: " + ("; ".join(lines) or "nothing")


class Stack:
    """One `greenroom up`; use it as a context manager."""

    def __init__(
        self,
        *,
        gateways: int = 1,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        up: Sequence[str] = UP,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 60.0,
        settle_s: float = 2.0,
    ) -> None:
        """Nothing is started yet.

        `env` is added to the environment of every process (`GREENROOM_ENGINE__START=spawn`); inherited `GREENROOM_*`
        variables are dropped. `directory` is kept if given; otherwise a temporary one is made, and removed when all
        went well. `settle_s` is how long the kernel may take to bury what the supervisor has killed.
        """
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="greenroom-stack-"))
        if self._temporary:
            self.directory.chmod(0o711)  # so that Postgres, which does not run as root, can reach its database in it
        self.data_dir = self.directory / "data"
        self.run_dir = Path(f"/tmp/gr-{secrets.token_hex(4)}")
        self.gateways = gateways
        self.port = ports.free(gateways + 1)
        self.operator_port = self.port + 1
        self.exit_code: int | None = None
        self._up = tuple(up)
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._settle_s = settle_s
        self._process: subprocess.Popen[bytes] | None = None
        self.shared_memory_before: frozenset[str] = frozenset()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("GREENROOM_")} | {
            "GREENROOM_DATA_DIR": str(self.data_dir),
            "GREENROOM_RUN_DIR": str(self.run_dir),
            "GREENROOM_GATEWAY__PORT": str(self.port),
            "GREENROOM_GATEWAY__OPERATOR_PORT": str(self.operator_port),
            "GREENROOM_GATEWAY__COUNT": str(gateways),
            **(env or {}),
        }
        """What its processes run with; give it to other commands that should reach this stack."""

    @property
    def url(self) -> str:
        """Tenants' base address, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The supervisor's."""
        if self._process is None:
            raise StackFailed("the stack has not been started")
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """What the supervisor and its children print."""
        return self.directory / "up.log"

    @property
    def admin_key(self) -> str:
        """The operators' key that the first start made."""
        return (self.data_dir / "admin-key").read_text().strip()

    @property
    def settings(self) -> Settings:
        """What its processes read from their environment."""
        return load(self.env)

    def operator_url(self, gateway: int = 0) -> str:
        """Operators' base address of the n-th gateway."""
        return f"http://127.0.0.1:{self.operator_port + gateway}"

    def start(self) -> Self:
        """Start the supervisor; returns once every gateway is ready and the engine host has imported vLLM.

        Raises `StackFailed`, and then nothing is running.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.shared_memory_before = processes.shared_memory()
        self.exit_code = None
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._up,
                cwd=self.directory,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until(self._ready, "the gateways and the engine host to be ready", self._start_timeout_s)
        except BaseException as error:
            left = self.stop()
            if left:
                error.add_note(str(left))
            raise
        return self

    def stop(self, how: signal.Signals = signal.SIGINT, *, to_group: bool = True) -> Leftovers:
        """Stop it and say what is left, after that is killed. `exit_code` is the supervisor's.

        `to_group` signals the supervisor's process group, as a terminal does; without it the supervisor alone, as an
        init system does.
        """
        late_s = None
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if to_group else os.kill)(self._process.pid, how)
            try:
                self._process.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                late_s = self._stop_timeout_s
        if self._process is not None:
            self.exit_code = self._process.poll()
        left = self._leftovers(late_s)
        for process in left.processes:
            processes.kill(process)
        if self._process is not None:
            self._process.wait()
        return left

    def processes(self) -> list[Process]:
        """All living processes of this stack: what descends from the supervisor, and what touches its directories."""
        found = {process.pid: process for process in processes.touching([self.data_dir, self.run_dir])}
        if self._process is not None and self._process.poll() is None:
            found |= {process.pid: process for process in processes.descendants(self._process.pid)}
        return sorted(found.values(), key=lambda process: process.pid)

    def greenroom(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """Run `greenroom … --json` against this stack and return what it printed, decoded."""
        done = subprocess.run(
            [*CLI, *arguments, "--json"],
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            command = " ".join(arguments)
            raise StackFailed(
                f"greenroom {command}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return json.loads(done.stdout) if done.stdout.strip() else None

    def admin(self, method: str, path: str, body: Any = None, *, gateway: int = 0, timeout_s: float = 60.0) -> Any:
        """One request to the admin API, `path` without `/admin/v1`; the decoded answer, `StackFailed` if not 2xx."""
        status, answer = _request(
            self.operator_port + gateway,
            method,
            f"/admin/v1{path}",
            body,
            {"Authorization": f"Bearer {self.admin_key}"},
            timeout_s,
        )
        if not 200 <= status < 300:
            raise StackFailed(f"{method} /admin/v1{path}: {status}: {answer[:500].decode(errors='replace')}")
        return json.loads(answer) if answer else None

    def set_up(self, model: Path, variants: Mapping[str, Mapping[str, Any]], *, workspace: str = "bench") -> str:
        """Add a model, a workspace and its variants (name: what else the admin API takes); returns a key of it."""
        self.greenroom("models", "add", MODEL, str(model))
        self.admin("POST", "/workspaces", {"name": workspace})
        self.wait_until(self._knows_its_devices, "the controller to say which devices there are", DEVICES_S)
        for name, fields in variants.items():
            self.admin("POST", f"/workspaces/{workspace}/variants", {"name": name, "model": MODEL, **fields})
        return str(self.admin("POST", f"/workspaces/{workspace}/keys", {"label": "bench"})["key"])

    def engines(self) -> list[dict[str, Any]]:
        """All engines that aren't stopped, as the admin API shows them."""
        return list(self.admin("GET", "/engines")["data"])

    def stop_engines(self, timeout_s: float = 60.0) -> None:
        """Stop all engines and return when there are none: no process, no reservation."""
        for engine in self.engines():
            self.admin("POST", f"/engines/{engine['id']}/stop", {"force": False})
        self.wait_until(lambda: not self.engines(), "the engines to stop", timeout_s)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the supervisor and its children printed."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Look every 20 ms until the condition holds. `StackFailed` if it doesn't in time, or the supervisor ends."""
        end = time.monotonic() + timeout_s
        while not condition():
            if self._process is not None and self._process.poll() is not None:
                raise StackFailed(f"greenroom up ended with {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > end:
                raise StackFailed(f"waited {timeout_s:.0f} s for {what}:\n{self.log_tail()}")
            time.sleep(0.02)

    def remove(self) -> None:
        """Delete the run directory and, if it is a temporary one, the directory.

        Postgres does not run as root; where its user can't reach the data directory, that holds a link to the database.
        """
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if self._temporary:
            shutil.rmtree((self.data_dir / "postgres").resolve(), ignore_errors=True)
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self.stop()
        if error is None and not left:
            self.remove()
            return
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if error is None:
            raise LeftBehind(f"{left} (files in {self.directory})")
        error.add_note(f"the stack's files are in {self.directory}")
        if left:
            error.add_note(str(left))

    def _knows_its_devices(self) -> bool:
        try:
            return bool(self.admin("GET", "/fleet")["devices"])
        except StackFailed:
            return False

    def _ready(self) -> bool:
        for gateway in range(self.gateways):
            try:
                status, _ = _request(self.operator_port + gateway, "GET", "/readyz", None, {}, 5.0)
            except (OSError, http.client.HTTPException):
                return False
            if status != 200:
                return False
        return self.settings.engine.launcher != "local" or readiness.host(self.settings.host_socket) is not None

    def _leftovers(self, late_s: float | None) -> Leftovers:
        """Look until nothing is left, for `settle_s` at most."""
        end = time.monotonic() + self._settle_s
        while True:
            running = tuple(self.processes()) if self._process is not None else ()
            paths = (self.run_dir, *self.run_dir.rglob("*")) if self.run_dir.exists() else ()
            litter = processes.unheld_shared_memory(processes.shared_memory() - self.shared_memory_before)
            left = Leftovers(running, tuple(paths), tuple(litter), late_s)
            if not left or late_s is not None or time.monotonic() > end:
                return left
            time.sleep(0.05)


def _request(
    port: int, method: str, path: str, body: Any, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, headers | ({"Content-Type": "application/json"} if text else {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
