"""One engine host for all tests of this folder, and one engine for those that leave it as it is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_host import SCRIPT, RealHost, RunningEngine, order

PROBE = Path(__file__).parents[3] / "import_probe.py"


@pytest.fixture(scope="session")
def ground() -> Iterator[Path]:
    """A short directory for sockets and files, with a space in its name."""
    path = Path(tempfile.mkdtemp(prefix="gr h", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def host(ground: Path, engine_python: Path) -> Iterator[RealHost]:
    """An engine host that forks; what its engines import is noted in `<ground>/imports`."""
    command = [engine_python, PROBE, ground / "imports", SCRIPT, "--cache", ground / "cache"]
    running = RealHost(command, ground / "host.sock", log=ground / "host.log")
    yield running
    running.end()


@pytest.fixture(scope="session")
def engine(host: RealHost, ground: Path, demo_model: Path) -> Iterator[RunningEngine]:
    """An engine that serves; no test may end it."""
    running = host.start(order(demo_model, ground)).wait_until_listening()
    yield running
    running.kill()


@pytest.fixture
def begin(host: RealHost, ground: Path, demo_model: Path) -> Iterator[Callable[..., RunningEngine]]:
    """Starts engines of the test's own (changes to the order as keywords), which are gone when it ends."""
    started: list[RunningEngine] = []

    def begin(**changes: Any) -> RunningEngine:
        started.append(host.start(order(demo_model, ground, **changes)))
        return started[-1]

    yield begin
    for running in started:
        running.kill()
