"""An engine that is spawned: slower, and the same to everybody else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_host import SCRIPT, RealHost, eventually, order

from engines.host import group

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def spawning_host(ground: Path, engine_python: Path) -> Iterator[RealHost]:
    """A host that was told to spawn; it is there at once, as it imports nothing. Its engines end with the test."""
    command = [engine_python, SCRIPT, "--cache", ground / "cache", "--mode", "spawn"]
    running = RealHost(command, ground / "spawn.sock", log=ground / "spawn.log")
    yield running
    running.end_engines()
    running.end()


def test_a_spawned_engine_has_phases_a_book_and_no_orphans(
    spawning_host: RealHost, ground: Path, demo_model: Path
) -> None:
    answer = spawning_host.request("hello", epoch=1)
    assert (answer["mode"], answer["gate"]) == ("spawn", None)
    engine = spawning_host.start(order(demo_model, ground, threads=2, env={"CXX": "no compiler"}))
    engine.wait_until_listening(within_s=180.0)  # half a minute on two idle cores
    assert [name for name, _ in engine.phases()] == ["fork", "config", "weights", "init", "listening"]
    message = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    said = engine.ask("/v1/chat/completions", "s1", **message, n=2, temperature=1, logprobs=True, top_logprobs=2)
    entries = engine.book("s1", 2)
    assert sum(entry["prompt"] for entry in entries) == said["usage"]["prompt_tokens"]
    assert sum(entry["completion"] for entry in entries) == said["usage"]["completion_tokens"]
    os.kill(engine.pid, signal.SIGKILL)
    eventually(lambda: not group.members(engine.pid), within_s=10.0)
    assert spawning_host.exit_status(engine) == -signal.SIGKILL
