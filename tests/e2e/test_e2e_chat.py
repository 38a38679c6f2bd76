"""What a workspace's client meets: real answers, and clear refusals."""

from __future__ import annotations

import time

import openai
import pytest

from loadtests.bench.stack import MODEL, Stack
from tests.e2e.chats import PROMPT, Client


def test_the_official_client_gets_a_real_answer_streamed_and_not(stack: Stack, client: Client) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=client.key, timeout=60) as official:
        messages = [{"role": "user", "content": PROMPT}]
        whole = official.chat.completions.create(model="bot", messages=messages, max_tokens=16, temperature=0)
        chunks = list(
            official.chat.completions.create(model="bot", messages=messages, max_tokens=16, temperature=0, stream=True)
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert "Paris" in (whole.choices[0].message.content or "")
        assert streamed == whole.choices[0].message.content
        assert whole.model == "bot" and {chunk.model for chunk in chunks} == {"bot"}
        assert all(chunk.usage is None for chunk in chunks), "usage that nobody asked for"
        assert whole.usage is not None and whole.usage.prompt_tokens == 37
        text = official.completions.create(model="bot", prompt="The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in text.choices[0].text
        assert [model.id for model in official.models.list()] == ["bot", "brief"]


def test_usage_comes_with_a_stream_only_when_asked_for(client: Client) -> None:
    asked = client.chat(stream=True)
    assert asked.stream is not None and asked.stream.tokens is not None
    silent = client.chat(stream=True, stream_options=None)
    assert silent.stream is not None and silent.stream.tokens is None
    assert silent.text == asked.text


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, None, None),
        (b'{"model": "bot"}', 400, None, "messages"),
        ({"model": "bot", "messages": "hi"}, 400, None, "messages"),
        ({"model": 7, "messages": []}, 400, None, "model"),
        ({"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}, 404, "model_not_found", "model"),
        ({"model": "bot", "messages": [{"role": "user", "content": "word " * 4000}]}, 400, None, None),
        ({"model": "bot", "messages": [{"role": "user", "content": "x" * (5 << 20)}]}, 413, None, None),
    ],
    ids=["json", "missing", "type", "model type", "unknown model", "too long", "too large"],
)
def test_a_bad_request_is_refused_with_its_reason(
    client: Client, body: object, status: int, code: str | None, param: str | None
) -> None:
    reply = client.post("/v1/chat/completions", body)
    assert reply.status == status, reply
    error = reply.body["error"]
    assert isinstance(error["message"], str) and error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    if status == 404:
        assert "bot" in error["message"] and "brief" in error["message"]


def test_a_key_that_is_unknown_or_missing_opens_nothing(client: Client) -> None:
    for key in ("gr-aaaaaaaaaaaa-" + "b" * 40, "nonsense", ""):
        reply = client.get("/v1/models", key=key)
        assert (reply.status, reply.body["error"]["code"]) == (401, "invalid_api_key")
        assert not key or key not in reply.body["error"]["message"]


def test_a_revoked_key_is_refused_within_two_seconds(stack: Stack, client: Client) -> None:
    made = stack.admin("POST", "/workspaces/acme/keys", {"label": "to revoke"})
    assert client.get("/v1/models", key=made["key"]).status == 200
    stack.admin("DELETE", f"/workspaces/acme/keys/{made['id']}")
    revoked = time.monotonic()
    while client.get("/v1/models", key=made["key"]).status == 200:
        assert time.monotonic() - revoked < 2.0


def test_i7_a_workspace_neither_sees_nor_reaches_anothers_variants(stack: Stack, client: Client) -> None:
    stack.admin("POST", "/workspaces", {"name": "other"})
    stack.admin("POST", "/workspaces/other/variants", {"name": "secret-bot", "model": MODEL})
    assert [model["id"] for model in client.get("/v1/models").body["data"]] == ["bot", "brief"]
    reply = client.chat("secret-bot")
    assert reply.status == 404 and "secret-bot" in reply.body["error"]["message"]
    assert client.get("/v1/models/secret-bot").status == 404
