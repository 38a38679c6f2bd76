"""How requests end otherwise: clients that leave, engines that fail, a gateway that drains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest
from gateways import BOT, FakeEngine, Gateway, Start, events, until

from app import server
from engines.model import EngineState, PoolFailure, PoolStatus

ABORT_S = 0.2
"""Between a client's leaving and the engine's abort."""


async def leave_when(gateway: Gateway, here: Any, **fields: Any) -> float:
    """Ask, wait for `here` to hold (an engine: to have been asked), and cut the connection; when that was."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    body = json.dumps({"model": "bot", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    if here is None:
        await reader.readuntil(b"w1")
    elif isinstance(here, FakeEngine):
        await asked_once(here)
    else:
        await until(here)
    left = time.time()
    writer.transport.abort()
    return left


async def asked_once(engine: FakeEngine) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while not (asked := await engine.asked()):
            await asyncio.sleep(0.005)
    return asked[0]


async def aborted(engine: FakeEngine) -> dict[str, Any]:
    """The engine's own record of the request, once it has ended there."""
    async with asyncio.timeout(10):
        while (asked := await asked_once(engine))["ended"] is None:
            await asyncio.sleep(0.005)
    return asked


async def test_a_client_that_leaves_a_stream_aborts_the_engine_within_200_ms(gateway: Gateway) -> None:
    engine = await gateway.engine(tokens=1000, gap_s=0.02, prompt=9)
    left = await leave_when(gateway, None, stream=True, max_tokens=1000)
    asked = await aborted(engine)
    assert asked["reason"] == "abort"
    assert asked["ended"] - left < ABORT_S
    (row,) = await gateway.ended()
    assert (row["outcome"], row["source"], row["prompt_tokens"]) == ("client_gone", "stream", 9)
    assert 2 <= row["completion_tokens"] <= asked["completion"]
    assert gateway.parts.admission.running() == 0


async def test_a_client_that_leaves_before_the_first_token_aborts_the_engine_within_200_ms(gateway: Gateway) -> None:
    engine = await gateway.engine(first_s=60)
    left = await leave_when(gateway, engine, stream=True)
    asked = await aborted(engine)
    assert asked["ended"] - left < ABORT_S
    (row,) = await gateway.ended()
    assert row["pending"]["outcome"] == "client_gone"
    assert row["pending"]["source"] is None


async def test_a_client_that_leaves_an_answer_that_is_not_streamed_leaves_its_tokens_to_the_book(
    gateway: Gateway,
) -> None:
    engine = await gateway.engine(tokens=1000, gap_s=0.01)
    seen: list[dict[str, Any]] = []

    async def watch() -> None:
        while not seen:
            seen.extend(await engine.asked())
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    left = await leave_when(gateway, lambda: bool(seen), max_tokens=1000)
    await watching
    asked = await aborted(engine)
    assert asked["reason"] == "abort"
    assert asked["ended"] - left < ABORT_S
    (row,) = await gateway.ended()
    assert row["pending"]["outcome"] == "client_gone"
    assert row["pending"]["request_id"] == (await engine.book_line())["request_id"]


async def test_several_sequences_that_are_cut_short_are_counted_by_the_book(gateway: Gateway) -> None:
    await gateway.engine(tokens=1000, gap_s=0.02)
    await leave_when(gateway, None, stream=True, n=2, max_tokens=1000)
    (row,) = await gateway.ended()
    assert row["pending"]["source"] is None


async def test_a_client_that_leaves_a_hold_is_out_of_the_queue_at_once_and_used_nothing(gateway: Gateway) -> None:
    await leave_when(gateway, lambda: gateway.parts.admission.waiting() == 1, stream=True)
    await until(lambda: gateway.parts.admission.waiting() == 0, timeout_s=ABORT_S)
    (row,) = await gateway.ended()
    assert (row["outcome"], row["source"], row["engine"], row["cold"]) == ("client_gone", "none", None, True)


# Engines that fail ----------------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_before_its_first_token_is_passed_over(gateway: Gateway) -> None:
    bad = await gateway.engine(exit_after=0)
    good = await gateway.start_engine(tokens=2)
    gateway.publish()
    chunks = await gateway.events()
    assert chunks[-1] == "[DONE]"
    rows = await gateway.ended(2)
    assert [(row["attempt"], row["final"], row["outcome"], row["source"]) for row in rows] == [
        (1, False, "engine_failed", "none"),
        (2, True, "completed", "stream"),
    ]
    assert [str(row["engine"]) for row in rows] == [bad.id, good.id]
    (asked,) = await good.asked()
    assert asked["request_id"] == f"{rows[0]['request_id']}.2"


@pytest.mark.parametrize("script", [{"drop_after": 0}, {"status": 500}, {"status": 500, "first_frame": True}])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_fails_twice_before_its_first_token_is_a_true_503(
    gateway: Gateway, script: dict[str, Any], stream: bool
) -> None:
    await gateway.engine(**script)
    async with gateway.post(stream=stream) as answer:
        if not stream and script.get("first_frame"):
            assert answer.status == 200
            return
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        error = (await answer.json())["error"]
    assert (error["code"], error["type"]) == ("engine_failed", "server_error")
    rows = await gateway.ended(2)
    assert [(row["attempt"], row["final"], row["outcome"]) for row in rows] == [
        (1, False, "engine_failed"),
        (2, True, "engine_failed"),
    ]
    assert {(row["source"], row["completion_tokens"]) for row in rows} == {("none", 0)}


async def test_a_first_attempt_waits_for_a_new_engine_when_the_only_one_is_gone(gateway: Gateway) -> None:
    bad = await gateway.engine(exit_after=0)
    task = asyncio.create_task(gateway.events())
    await bad.process.wait()
    await until(lambda: gateway.parts.admission.waiting() == 1)
    gateway.engines.remove(bad)
    gateway.publish()
    await gateway.engine(tokens=1)
    assert (await task)[-1] == "[DONE]"
    rows = await gateway.ended(2)
    assert [row["cold"] for row in rows] == [False, True]


@pytest.mark.parametrize(
    "script", [{"exit_after": 2}, {"drop_after": 2}, {"error_after": 2}, {"silent_end": True, "tokens": 2}]
)
async def test_an_engine_that_fails_in_the_middle_is_an_error_frame_and_done(
    gateway: Gateway, script: dict[str, Any]
) -> None:
    await gateway.engine(**script)
    chunks = await gateway.events()
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["error"]["code"] == "engine_failed"
    assert "EngineCore" not in str(chunks)
    said = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-2]]
    if script.keys() & {"exit_after", "drop_after"}:  # what was on its way when the connection broke may be lost
        assert said == ["", " w0", " w1"][: max(1, len(said))]
    else:
        assert said == ["", " w0", " w1"]
    (row,) = await gateway.ended()
    assert (row["outcome"], row["final"]) == ("engine_failed", True)
    assert gateway.parts.admission.running() == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_what_an_engine_refuses_is_passed_on_with_its_words(gateway: Gateway, stream: bool) -> None:
    words = "This model's maximum context length is 64 tokens. However, you requested 99 tokens of m-0123456789abcdef."
    engine = await gateway.engine(status=400, message=words)
    async with gateway.post(stream=stream) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert error["message"] == words.replace("m-0123456789abcdef", "bot")
    assert len(await engine.asked()) == 1
    (row,) = await gateway.ended()
    assert (row["outcome"], row["source"], row["detail"]) == ("engine_refused", "none", "the engine answered 400")


async def test_a_refusal_in_the_first_frame_is_a_true_status_too(gateway: Gateway) -> None:
    await gateway.engine(status=400, message="no such tool", first_frame=True)
    async with gateway.post(stream=True) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["message"] == "no such tool"


async def test_a_silent_engine_is_lost(start: Start) -> None:
    gateway = await start(engine_read_s=0.2)
    await gateway.engine(tokens=3, gap_s=30)
    chunks = await gateway.events()
    assert (chunks[-2]["error"]["code"], chunks[-1]) == ("engine_failed", "[DONE]")


# Holds that end -------------------------------------------------------------------------------------------------------


async def test_i5_a_hold_that_ends_says_when_to_come_back(start: Start) -> None:
    gateway = await start(hold_s=0.05)
    gateway.publish(status=PoolStatus(pool=BOT.spec.pool, desired=1, start_s=7.0))
    async with gateway.post() as answer:
        assert answer.status == 503
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("7", "true")
        assert (await answer.json())["error"]["code"] == "model_loading"
    (row,) = await gateway.ended()
    assert (row["outcome"], row["source"], row["cold"]) == ("hold_expired", "none", True)
    assert row["held_us"] >= 49_000


async def test_a_client_is_held_no_longer_than_half_of_what_it_waits(gateway: Gateway) -> None:
    headers = {**gateway.auth(), "x-stainless-read-timeout": "0.2"}
    body = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
    began = time.monotonic()
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 503
    assert 0.1 <= time.monotonic() - began < 2


async def test_i5_a_failed_start_is_told_at_once_with_a_hint(gateway: Gateway) -> None:
    task = asyncio.create_task(gateway.post().__aenter__())
    await until(lambda: gateway.parts.admission.waiting() == 1)
    failure = PoolFailure(reason="its weights don't load", failures=3, retry_at=time.time() + 500)
    gateway.publish(status=PoolStatus(pool=BOT.spec.pool, desired=1, start_s=7.0, failure=failure))
    answer = await task
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], answer.headers["retry-after"]) == (503, "model_load_failed", "60")
    assert "its weights don't load" in error["message"]
    answer.release()
    (row,) = await gateway.ended()
    assert row["outcome"] == "load_failed"


async def test_a_full_queue_is_told(start: Start) -> None:
    gateway = await start(queue_length=1, hold_s=5)
    task = asyncio.create_task(gateway.post().__aenter__())
    await until(lambda: gateway.parts.admission.waiting() == 1)
    async with gateway.post() as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "overloaded")
    await gateway.engine()
    (await task).release()
    assert sorted(row["outcome"] for row in await gateway.ended(2)) == ["completed", "overloaded"]


# Draining -------------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_open_streams_end_refuses_what_is_new_and_ends_what_lasts(start: Start) -> None:
    gateway = await start(drain_s=0.5)
    engine = await gateway.engine(tokens=5, gap_s=0.05)
    short = asyncio.create_task(gateway.events())
    await asked_once(engine)
    await engine.script(tokens=10_000, gap_s=0.05)
    long = asyncio.create_task(gateway.events(max_tokens=10_000))
    await until(lambda: gateway.parts.admission.running() == 2)
    for _ in range(100):
        if len(await engine.asked()) == 2:
            break
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)  # both have begun to answer
    gateway.parts.drain.begin()
    async with gateway.post() as answer:
        assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
        assert (await answer.json())["error"]["code"] == "shutting_down"
    async with gateway.session.get(f"{gateway.operators}/readyz") as answer:
        assert (answer.status, await answer.text()) == (503, "draining")
    assert "error" not in (await short)[-2]
    chunks = await long
    assert (chunks[-2]["error"]["code"], chunks[-1]) == ("shutting_down", "[DONE]")
    rows = await gateway.ended(2)
    assert sorted((row["outcome"], row["source"]) for row in rows) == [("completed", "stream"), ("drained", "stream")]
    assert (await engine.asked())[1]["reason"] == "abort"
    await asyncio.wait_for(gateway.serving, 10)


async def test_a_drain_ends_holds_at_once(gateway: Gateway) -> None:
    task = asyncio.create_task(gateway.post().__aenter__())
    await until(lambda: gateway.parts.admission.waiting() == 1)
    gateway.parts.drain.begin()
    answer = await task
    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "shutting_down")
    answer.release()
    (row,) = await gateway.ended()
    assert row["outcome"] == "drained"


async def test_a_draining_engine_finishes_what_it_has_and_gets_nothing_new(gateway: Gateway) -> None:
    old = await gateway.engine(tokens=5, gap_s=0.05)
    running = asyncio.create_task(gateway.events())
    await asked_once(old)
    old.state = EngineState.DRAINING
    new = await gateway.engine(tokens=1)
    await gateway.events()
    assert (await running)[-1] == "[DONE]"
    assert (len(await old.asked()), len(await new.asked())) == (1, 1)


async def test_a_gateway_that_is_not_alone_stops_listening_when_it_drains(gateway: Gateway) -> None:
    from litestar import Litestar

    from app.drain import Drain

    listener = server.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    drain, request = Drain(5.0), Open()
    serving = asyncio.create_task(server.run([(Litestar([], openapi_config=None), listener)], drain, alone=False))
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    drain.enter(request)
    drain.begin()
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(ConnectionResetError):
                try:
                    _, other = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    break
                other.close()
    assert not serving.done()
    drain.leave(request)
    writer.close()
    await asyncio.wait_for(serving, 10)


class Open:
    def deadline(self) -> None:
        pass


def test_the_strict_reader_of_streams_is_strict() -> None:
    with pytest.raises(AssertionError):
        events(b"data: {}\n")
