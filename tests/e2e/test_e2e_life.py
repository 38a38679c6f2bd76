"""Engines come when somebody asks and leave when nobody does."""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial
from pathlib import Path

from loadtests.bench.stack import MODEL, Stack
from tests.e2e.chats import Client, at_once
from tests.e2e.rows import finals, query, settled


def test_i6_fifty_first_requests_cause_one_start_and_get_fifty_answers(stack: Stack, cold: Client) -> None:
    before = [engine for engine, _, _ in _started(stack)]
    replies = at_once(50, [partial(cold.chat, max_tokens=4), partial(cold.chat, max_tokens=4, stream=True)])
    assert [str(reply) for reply in replies if not reply.good] == []
    started = [row for row in _started(stack) if row[0] not in before]
    first_ready = min(ready_at for _, _, ready_at in started if ready_at is not None)
    assert sum(created_at < first_ready for _, created_at, _ in started) == 1
    # On a machine so loaded that one engine can't keep up, the queue may ask for a second one once the first is ready.
    assert len(started) <= 2


def test_an_idle_engine_leaves_after_its_timeout_and_the_next_request_wakes_another(stack: Stack, cold: Client) -> None:
    assert cold.chat("brief").good
    (engine,) = stack.engines()
    answered = time.monotonic()
    stack.wait_until(lambda: not stack.engines(), "the idle engine to be gone", 30)
    assert time.monotonic() - answered >= 2.0, "evicted before its time-out"
    assert _processes_of(stack, engine) == []
    assert _reserved(stack) == 0
    assert cold.chat("brief").good
    assert [other["id"] != engine["id"] for other in stack.engines()] == [True]


def test_i3_an_engine_is_not_evicted_while_a_request_runs_beyond_the_idle_timeout(stack: Stack, cold: Client) -> None:
    reply = cold.chat("brief", stream=True, max_tokens=800, ignore_eos=True)
    assert reply.good and reply.completion_tokens == 800, reply
    settled(stack)
    row = finals(stack)[reply.request_id]
    ran_s = (row["duration_us"] - row["queued_us"]) / 1e6
    assert ran_s > 3.0, "too quick to prove anything: the stream must outlast the time-out of two seconds"
    left = "SELECT min(started_at) AS at FROM engine_interval WHERE engine = $1 AND state = ANY($2)"
    (interval,) = query(stack, left, row["engine"], ["draining", "stopping", "failed", "stopped"])
    assert interval["at"] is None or interval["at"] >= row["ended_at"], "it left READY while it had a request"


def test_a_provisioned_variant_has_an_engine_without_being_asked(stack: Stack, cold: Client) -> None:
    variant = {
        "name": "promised",
        "model": MODEL,
        "scaling": {"provisioned": 2, "idle_timeout_s": 1},
        "arguments": {"max_model_len": 512},
    }
    stack.admin("POST", "/workspaces/acme/variants", variant)
    try:
        stack.wait_until(lambda: [e["state"] for e in stack.engines()] == ["ready"], "the promised engine", 60)
        assert cold.chat("promised").good
        (row,) = query(stack, "SELECT cold, held_us FROM usage_event WHERE variant = 'promised'")
        assert (row["cold"], row["held_us"]) == (False, 0)
    finally:
        stack.admin("DELETE", "/workspaces/acme/variants/promised")
    stack.wait_until(lambda: not stack.engines(), "an engine that nobody wants any more to leave", 60)


def test_a_stopped_engine_finishes_its_stream_first(stack: Stack, cold: Client) -> None:
    def stop_soon() -> None:
        stack.wait_until(lambda: [e["state"] for e in stack.engines()] == ["ready"], "the engine", 60)
        time.sleep(0.5)
        stack.stop_engines()

    reply, _ = at_once(2, [partial(cold.chat, stream=True, max_tokens=200, ignore_eos=True), stop_soon])
    assert reply.good and reply.completion_tokens == 200, reply


def test_a_model_that_vllm_can_not_load_fails_clearly_and_does_not_hang(
    stack: Stack, cold: Client, demo_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in demo_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = broken / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 576', '"hidden_size": 640'))
    stack.greenroom("models", "add", "broken", str(broken))
    stack.admin("POST", "/workspaces/acme/variants", {"name": "broken-bot", "model": "broken"})
    try:
        for stream in (False, True):
            reply = cold.chat("broken-bot", stream=stream)
            assert (reply.status, reply.body["error"]["code"]) == (503, "model_load_failed"), reply
            assert 0 < float(reply.headers["retry-after"]) <= 60
            assert str(stack.data_dir) not in reply.body["error"]["message"]
        stack.wait_until(lambda: not stack.engines(), "the failed engine to be buried", 60)
        failed = [e for e in stack.admin("GET", "/engines?stopped=true")["data"] if e["failure"]]
        assert failed and failed[0]["last_lines"], "an operator sees why"
        logs = stack.admin("GET", f"/engines/{failed[0]['id']}/logs")["lines"]
        assert any("Error" in line for line in logs)
    finally:
        stack.admin("DELETE", "/workspaces/acme/variants/broken-bot")


def _started(stack: Stack) -> list[tuple[str, datetime, datetime | None]]:
    """Every engine there ever was: its id, when it was placed, when it was ready."""
    rows = query(stack, "SELECT id, created_at, ready_at FROM engine")
    return [(str(row["id"]), row["created_at"], row["ready_at"]) for row in rows]


def _reserved(stack: Stack) -> int:
    devices = stack.admin("GET", "/fleet")["devices"]
    return sum(device["reserved_bytes"] for device in devices)


def _processes_of(stack: Stack, engine: dict[str, object]) -> list[str]:
    return [str(process) for process in stack.processes() if process.session == engine["pid"]]
