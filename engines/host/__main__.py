"""The engine host: a process of the engine environment that has imported vLLM once and forks engines.

It forks (or spawns), reaps and answers, nothing else, and has one thread. Whatever is known of a running engine is seen
from outside; so the host may die at any time, engines serve on, and the next host starts new ones.

    __main__  environment   the process, its environment and that of engines
    server    protocol      requests, children, exit statuses
    starters  gate          fork or spawn, and why
    preload   shortcuts     what is done once for all engines
    fork      process       from a copy of the host to an engine
    spawn     spawned       an engine without a fork
    engine    early         vLLM's server, the engine core first
    hooks     book  phases  what Greenroom adds to it
    seams                   every function of vLLM that is wrapped or replaced
    layout    group         an engine's files and processes; for the launcher too

By hand, with a model's folder and any run directory with a short name:

    .venv-engine/bin/python engines/host/__main__.py --socket /tmp/try/host.sock &
    .venv/bin/python -c '
    import socket, sys
    from engines.host.protocol import StartOrder, start_request
    host = socket.socket(socket.AF_UNIX)
    host.connect("/tmp/try/host.sock")  # refused until vLLM has been imported, some ten seconds
    host.sendall(start_request(StartOrder(
        engine="1", epoch=1, model_path=sys.argv[1], served_name="m", engine_dir="/tmp/try/1", run_dir="/tmp/try/r1",
        argv=("--max-model-len", "2048", "--kv-cache-memory-bytes", "268435456", "--enforce-eager"))))
    print(host.recv(4096))' $PWD/var/models/smollm2-135m
    curl --unix-socket /tmp/try/r1/s http://e/v1/completions --json '{"model": "m", "prompt": "Once upon a time"}'
    cat /tmp/try/1/phases.jsonl /tmp/try/1/book.jsonl
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Python puts a script's directory on the path, where `book`, `fork` and others would hide modules of those names.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _HERE]
sys.path.append(str(_HERE.parents[1]))

from engines.host import environment, gate, preload, process, starters  # noqa: E402
from engines.host.server import Server, Starter  # noqa: E402

sys.path.pop()

_LOCK_WAIT_S = 5.0

log = logging.getLogger("greenroom.host")


def main() -> int:
    """Run the host until SIGTERM; returns its exit status."""
    parser = argparse.ArgumentParser(prog="engine-host", description="Forks engines.")
    parser.add_argument(
        "--socket", type=Path, required=True, help="Unix socket to listen on; its directory is made 0700"
    )
    parser.add_argument("--mode", choices=("fork", "spawn"), default="fork", help="how engines are started")
    parser.add_argument("--cache", type=Path, help="directory for vLLM's caches (default: beside the socket)")
    options = parser.parse_args()
    process.name("greenroom: engine-host")
    path = options.socket.absolute()
    cache = (options.cache or path.parent / "cache").absolute()
    fixed = environment.host_environment(os.environ, cache)
    os.environ.clear()
    os.environ.update(fixed)
    os.umask(0o077)
    _log_to_stderr()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _lock(path.with_suffix(".lock")):
        log.error("another engine host has %s", path)
        return 1
    process.adopt_orphans()
    Server(path, _starter(options.mode)).run()
    # No interpreter shutdown: taking a million objects apart takes seconds, and children live on anyway.
    sys.stderr.flush()
    os._exit(0)


def _lock(path: Path) -> bool:
    """Be the only host of a socket until the process ends; waits a while for one that is just ending."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _starter(mode: str) -> Starter:
    if mode == "spawn":
        return starters.Spawner()
    parser, unfit = None, gate.unfit()
    if unfit is None:
        try:
            parser = preload.import_engine()
        except Exception:
            log.exception("importing vLLM failed")
            unfit = "vLLM could not be imported; the engine host's log says why"
    if reason := unfit or gate.shut():
        log.warning("engines will be spawned, which is slow: %s", reason)
    return starters.Forker(parser, unfit)


def _log_to_stderr() -> None:
    """For this logger alone: engines inherit the root logger, which must stay as vLLM expects it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s engine-host %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


if __name__ == "__main__":
    sys.exit(main())
