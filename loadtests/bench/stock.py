"""Engines started as vLLM's own documentation says, for comparison: `python -m vllm.entrypoints.openai.api_server`.

`default_env` is vLLM as it comes, apart from what keeps it from talking to the network. `tuned_env` is all that an
environment can do for a quick start: that of our engines.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from engines.host import environment
from loadtests.bench import processes
from loadtests.bench.chat import Answer, UnixConnection, ask

SERVED = "stock"
START_TIMEOUT_S = 300.0
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}


class StockFailed(Exception):
    """A stock engine that did not start; the message ends with its last log lines."""


def default_env(cache: Path) -> dict[str, str]:
    """vLLM as it comes; `cache` holds its caches, so that the first of several starts fills them for the others."""
    kept = {name: value for name, value in os.environ.items() if name in environment.INHERITED}
    return {**kept, **QUIET, "VLLM_CACHE_ROOT": str(cache / "vllm"), "HF_HOME": str(cache / "huggingface")}


def tuned_env(cache: Path) -> dict[str, str]:
    """The environment of our engine host, and so of our engines."""
    return environment.host_environment(os.environ, cache)


def is_byte_compiled(python: Path) -> bool:
    """Whether nearly all of vLLM in the environment of this interpreter has been compiled to bytecode beforehand."""
    sources = [
        source
        for site in python.parent.parent.glob("lib/python3.*/site-packages")
        for source in site.glob("vllm/**/*.py")
    ]
    compiled = sum(1 for source in sources if list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")))
    return bool(sources) and compiled >= 0.95 * len(sources)


class StockEngine:
    """One API server and its children; leaving the block ends all of them."""

    def __init__(self, python: Path, model: Path, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Nothing is started yet. `argv` are the engine's arguments, without model, socket and served name."""
        self._home = Path(tempfile.mkdtemp(prefix="gr-stock-", dir="/tmp"))
        self._socket = self._home / "s"
        self._log = self._home / "log"
        self._command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--uds", str(self._socket), "--served-model-name", SERVED, *argv),
        ]
        self._env = {**env, "TMPDIR": str(self._home)}
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0

    def __enter__(self) -> Self:
        self._spawned_at = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def first_token(self) -> tuple[float, Answer]:
        """Seconds from the spawn to the first token, and the answer; asks as soon as the socket takes a connection."""
        assert self._process is not None
        while True:
            before = time.perf_counter()
            connection = UnixConnection(self._socket, START_TIMEOUT_S)
            with contextlib.suppress(OSError):
                connection.connect()
                answer = ask(connection, model=SERVED)
                return before - self._spawned_at + answer.first_token_s, answer
            if self._process.poll() is not None or before - self._spawned_at > START_TIMEOUT_S:
                lines = self._log.read_text(errors="replace").splitlines()[-20:]
                raise StockFailed("a stock engine did not start:\n" + "\n".join(lines))
            time.sleep(0.01)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        members = processes.touching([self._home])
        litter = {name for process in members for name in processes.mapped_shared_memory(process.pid)}
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        for process in processes.touching([self._home]):
            processes.kill(process)
        self._process.wait()
        for name in processes.unheld_shared_memory(litter):
            with contextlib.suppress(FileNotFoundError):
                (processes.SHM / name).unlink()
        shutil.rmtree(self._home, ignore_errors=True)
