"""The engine host: a process of the engine environment that has imported vLLM once and forks engines."""

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
    parser = argparse.ArgumentParser(prog="engine-host", description=__doc__)
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
