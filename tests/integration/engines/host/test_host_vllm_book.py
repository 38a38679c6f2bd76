"""The engine book of a real engine against what vLLM says of the same requests."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import pytest
from real_host import RunningEngine, eventually

pytestmark = pytest.mark.vllm

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = "Tell me of the rivers, hills and towns of a land. " * 25


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def new_id() -> str:
    return str(uuid.uuid4())


def totals(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "prompt_tokens": sum(entry["prompt"] for entry in entries),
        "completion_tokens": sum(entry["completion"] for entry in entries),
    }


def used(answer: dict[str, Any]) -> dict[str, int]:
    return {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "lines", "reasons"),
    [
        (CHAT, {"messages": message("What is the capital of France?"), "max_tokens": 20}, 1, {"stop"}),
        (CHAT, {"messages": message("Count to a hundred."), "max_tokens": 3}, 1, {"length"}),
        (CHAT, {"messages": message("Name the capital of France."), "max_tokens": 40, "stop": ["Paris"]}, 1, {"stop"}),
        (CHAT, {"messages": message("Tell me a joke."), "max_tokens": 5, "n": 3, "temperature": 1}, 3, {"length"}),
        (TEXT, {"prompt": "One, two, three,", "max_tokens": 4}, 1, {"length"}),
        (TEXT, {"prompt": ["Red, green,", "Once upon a time"], "max_tokens": 4}, 2, {"length"}),
        (TEXT, {"prompt": ["A", "B C", "D"], "max_tokens": 3, "n": 2, "temperature": 1}, 6, {"length"}),
    ],
    ids=["ended", "length", "stop string", "n", "text", "prompts", "prompts and n"],
)
def test_i2_a_request_has_a_line_for_each_sequence_and_they_sum_to_its_usage(
    engine: RunningEngine, path: str, body: dict[str, Any], lines: int, reasons: set[str], stream: bool
) -> None:
    request_id = new_id()
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    before_us = time.monotonic_ns() // 1000
    answer = engine.ask(path, request_id, **body, **options)
    after_us = time.monotonic_ns() // 1000
    entries = engine.book(request_id, lines)
    assert totals(entries) == used(answer)
    assert len(entries) == lines == len({entry["engine_request_id"] for entry in entries})
    assert {entry["reason"] for entry in entries} == reasons
    for entry in entries:
        assert before_us <= entry["start_us"] <= entry["end_us"] <= after_us
        assert abs(entry["at"] - time.time()) < 60


def test_i2_cached_tokens_are_those_of_the_usage(engine: RunningEngine) -> None:
    said, entered = [], []
    for _ in range(2):
        request_id = new_id()
        answer = engine.ask(CHAT, request_id, messages=message(LONG), max_tokens=2)
        said.append((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        entered.append(sum(entry["cached"] for entry in engine.book(request_id)))
    assert entered == said
    assert entered[1] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_i2_a_request_whose_client_leaves_is_entered_once_with_the_tokens_made(
    engine: RunningEngine, stream: bool, n: int
) -> None:
    request_id = new_id()
    body = {"messages": message("Write a very long story."), "max_tokens": 400, "ignore_eos": True, "temperature": 1}
    if stream:
        with engine.post(CHAT, request_id, **body, n=n, stream=True) as response:
            while b'"content":"' not in response.readline():
                pass
    else:
        connection = engine.connect()
        payload = json.dumps({"model": "m", "n": n, **body}).encode()
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: e\r\nX-Request-Id: {request_id}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        eventually(lambda: engine.gauge("vllm:num_requests_running") > 0)
        connection.close()
    entries = engine.book(request_id, n)
    assert [entry["reason"] for entry in entries] == ["abort"] * n
    assert sum(entry["prompt"] > 0 for entry in entries) == 1
    assert all(entry["completion"] < 400 for entry in entries)
    assert not stream or sum(entry["completion"] for entry in entries) > 0
    # What comes later shows that nothing is entered twice.
    engine.ask(CHAT, marker := new_id(), messages=message("Hello"), max_tokens=2)
    engine.book(marker)
    assert len(engine.book(request_id, n)) == n


def test_a_retry_has_the_number_of_its_attempt_in_the_id(engine: RunningEngine) -> None:
    request_id = f"{new_id()}.2"
    engine.ask(CHAT, request_id, messages=message("Hi"), max_tokens=2)
    assert [entry["request_id"] for entry in engine.book(request_id)] == [request_id]


def test_a_request_that_vllm_refuses_is_in_no_book(engine: RunningEngine) -> None:
    request_id = new_id()
    with engine.post(CHAT, request_id, messages=message(LONG * 20), max_tokens=2) as response:
        assert response.status == 400
        response.read()
    engine.ask(CHAT, marker := new_id(), messages=message("Hello"), max_tokens=2)
    engine.book(marker)
    assert engine.book(request_id, 0) == []


def test_no_text_of_a_request_is_in_the_log_whatever_goes_wrong_with_it(engine: RunningEngine) -> None:
    secret = "xylophonequartz"
    bad: list[dict[str, Any]] = [
        {"messages": message(secret * 3000)},
        {"messages": [{"role": secret, "content": secret}]},
        {"messages": message(secret), "temperature": secret},
        {"messages": message(secret), "tools": [{"type": "function", "function": {"name": secret}}]},
        {"messages": message(secret), "response_format": {"type": "json_schema", "json_schema": {"name": secret}}},
        {"messages": message(secret), "max_tokens": 3, "logprobs": True, "top_logprobs": 500},
    ]
    for body in bad:
        with engine.post(CHAT, new_id(), **body) as response:
            response.read()
    with engine.post(CHAT, new_id(), messages=message(secret), stream=True, max_tokens=50) as response:
        response.readline()
    engine.ask(CHAT, new_id(), messages=message(secret), max_tokens=3)
    assert secret not in engine.files.log.read_text()


def test_structured_output_works_though_its_tokenizer_comes_late(engine: RunningEngine) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = engine.ask(
        CHAT,
        new_id(),
        messages=message("Is water wet? Answer in JSON."),
        max_tokens=30,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"ok"}


def test_the_model_speaks_sense_with_every_shortcut_taken(engine: RunningEngine) -> None:
    answer = engine.ask(CHAT, new_id(), messages=message("What is the capital of France?"), max_tokens=20)
    assert "Paris" in answer["choices"][0]["message"]["content"]
