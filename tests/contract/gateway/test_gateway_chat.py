"""Chats and completions through a real gateway: what the client gets, what the engine got, what the ledger has."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any
from uuid import UUID

import openai
from gateways import SERVED, Gateway, events, until, variant

from engines import queries as engine_queries
from engines.model import EngineState


def text(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks[:-1] for choice in chunk["choices"])


async def test_i1_a_streamed_chat_goes_through_and_has_one_final_event(gateway: Gateway) -> None:
    engine = await gateway.engine(tokens=3, prompt=7, cached=4)
    async with gateway.post(stream=True) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-accel-buffering"] == "no"
        request_id = answer.headers["x-request-id"]
        chunks = events(await answer.read())
    assert UUID(request_id).version == 7
    assert chunks[-1] == "[DONE]"
    assert text(chunks) == " w0 w1 w2"
    assert {chunk["model"] for chunk in chunks[:-1]} == {"bot"}
    assert {chunk["id"] for chunk in chunks[:-1]} == {f"chatcmpl-{request_id}"}
    assert all("usage" not in chunk for chunk in chunks[:-1])
    (row,) = await gateway.ended()
    assert str(row["request_id"]) == request_id
    assert (row["final"], row["outcome"], row["source"]) == (True, "completed", "stream")
    assert (row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]) == (7, 4, 3)
    assert (str(row["engine"]), row["cold"], row["stream"], row["endpoint"]) == (engine.id, False, True, "chat")
    line = await engine.book_line()
    assert (line["request_id"], line["prompt"], line["cached"], line["completion"]) == (request_id, 7, 4, 3)


async def test_a_variant_can_be_named_before_the_gateway_was_told_of_it(gateway: Gateway) -> None:
    await gateway.engine(tokens=3)
    await engine_queries.create_variant(gateway.pool, "acme", variant("acme", "late"))
    async with gateway.post(model="late") as answer:
        assert (answer.status, (await answer.json())["model"]) == (200, "late")


async def test_the_engine_gets_our_fields_and_nothing_of_the_clients_headers(gateway: Gateway) -> None:
    engine = await gateway.engine()
    await gateway.events(x_extra={"a": [1.5]}, priority=-9)
    (asked,) = await engine.asked()
    body = json.loads(asked["body"])
    assert body["model"] == SERVED
    assert body["x_extra"] == {"a": [1.5]}
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "priority" not in body
    assert "acme" not in asked["body"]
    assert {name.lower() for name in asked["headers"]} == {
        "host",
        "accept",
        "content-type",
        "content-length",
        "x-request-id",
    }


async def test_a_variants_defaults_reach_the_engine(gateway: Gateway) -> None:
    engine = await gateway.engine(tokens=5)
    async with gateway.post(model="polite") as answer:
        body = await answer.json()
    assert (body["model"], body["usage"]["completion_tokens"]) == ("polite", 2)
    sent = json.loads((await engine.asked())[0]["body"])
    assert sent["messages"][0] == {"role": "system", "content": "Be kind."}


async def test_usage_is_shown_as_it_was_asked_for(gateway: Gateway) -> None:
    await gateway.engine(tokens=2)
    last = await gateway.events(stream_options={"include_usage": True})
    assert [chunk.get("usage") is not None for chunk in last[:-1]] == [False, False, False, True]
    assert last[-2]["choices"] == []
    every = await gateway.events(stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in every[:-1]] == [0, 1, 2, 2]


async def test_an_answer_that_is_not_streamed_is_the_engines_but_for_the_name(gateway: Gateway) -> None:
    await gateway.engine(tokens=2, prompt=3)
    async with gateway.post() as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        body = await answer.json()
    assert (body["model"], body["usage"]["total_tokens"]) == ("bot", 5)
    assert body["choices"][0]["message"]["content"] == " w0 w1"
    (row,) = await gateway.ended()
    assert (row["outcome"], row["source"], row["completion_tokens"], row["stream"]) == ("completed", "stream", 2, False)


async def test_completions_count_every_prompt_and_choice(gateway: Gateway) -> None:
    await gateway.engine(tokens=2, prompt=3)
    async with gateway.post("/v1/completions", prompt=["a", "b"], n=2) as answer:
        body = await answer.json()
    assert len(body["choices"]) == 4
    async with gateway.post("/v1/completions", prompt="a", n=3, stream=True) as answer:
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    rows = await gateway.ended(2)
    assert sorted((row["prompt_tokens"], row["completion_tokens"]) for row in rows) == [(3, 6), (6, 8)]
    assert {row["endpoint"] for row in rows} == {"completions"}


async def test_what_the_engine_sends_together_comes_together(gateway: Gateway) -> None:
    await gateway.engine(tokens=20, together=True)
    async with gateway.post(stream=True) as answer:
        parts = [part async for part, _ in answer.content.iter_chunks()]
    assert len(parts) <= 3


async def test_a_request_holds_until_an_engine_is_ready_and_is_cold(gateway: Gateway) -> None:
    engine = await gateway.start_engine(tokens=1)
    engine.state = EngineState.STARTING
    gateway.publish()
    task = asyncio.create_task(gateway.events())
    await _waiting(gateway, 1)
    engine.state = EngineState.READY
    gateway.publish()
    assert text(await task) == " w0"
    (row,) = await gateway.ended()
    assert row["cold"]
    assert 0 < row["held_us"] <= row["queued_us"] <= row["first_token_us"] <= row["duration_us"]


async def test_i1_i6_fifty_first_requests_are_fifty_answers_in_turn(gateway: Gateway) -> None:
    tasks = [asyncio.create_task(gateway.events()) for _ in range(50)]
    await _waiting(gateway, 50)
    engine = await gateway.engine(tokens=2, gap_s=0.002)
    for chunks in await asyncio.gather(*tasks):
        assert text(chunks) == " w0 w1"
    rows = await gateway.ended(50)
    assert len({row["request_id"] for row in rows}) == 50
    assert {(row["outcome"], row["completion_tokens"], row["final"]) for row in rows} == {("completed", 2, True)}
    assert len(engine.lines()) == 50
    assert gateway.parts.admission.running() == 0


async def test_a_variants_cap_is_kept(gateway: Gateway) -> None:
    engine = await gateway.engine(tokens=2, gap_s=0.02)
    await asyncio.gather(*(gateway.events(model="narrow") for _ in range(3)))
    times = sorted((asked["began"], asked["ended"]) for asked in await engine.asked())
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(times))


async def test_the_official_client_streams_and_reads_errors(gateway: Gateway) -> None:
    await gateway.engine(tokens=3)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="bot",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        listed = [model.id async for model in client.models.list()]
        assert listed == ["bot", "narrow", "polite"]
        try:
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
        except openai.NotFoundError as error:
            assert (error.code, error.param) == ("model_not_found", "model")
            assert "bot, narrow, polite" in error.message
            assert error.request_id is not None
        else:
            raise AssertionError("an unknown model was served")


async def test_one_trace_has_the_times_of_one_request_and_no_content(gateway: Gateway) -> None:
    engine = await gateway.start_engine(tokens=1)
    task = asyncio.create_task(gateway.events(messages=[{"role": "user", "content": "very secret"}]))
    await _waiting(gateway, 1)
    gateway.publish()
    await task
    (row,) = await gateway.ended()
    spans = {span.name: span for span in gateway.spans.get_finished_spans()}
    assert spans.keys() == {"POST /v1/chat/completions", "queue", "cold_start", "fork", "listening", "engine", "settle"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values() if span.context} == {row["trace_id"]}
    root = spans["POST /v1/chat/completions"]
    assert root.attributes is not None
    assert root.attributes["request_id"] == str(row["request_id"])
    assert root.attributes["engine"] == engine.id
    for span in spans.values():
        assert "secret" not in span.to_json()
        assert " w0" not in span.to_json()


async def _waiting(gateway: Gateway, count: int) -> None:
    await until(lambda: gateway.parts.admission.waiting() == count)
