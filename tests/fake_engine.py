"""A fake engine: a program that speaks like vLLM 0.32 on a Unix socket, keeps an engine book, and does what it is told.

    python tests/fake_engine.py --socket S --book B --served m-0123456789abcdef [--slots 16] [--script JSON]

Beside the engine's own routes (/v1/chat/completions, /v1/completions, /health, /metrics) it has

    POST /fake/script     a `Script` as JSON: how it treats requests from now on (what is left out goes back to default)
    GET  /fake/requests   what it was asked, and when each request began and ended (epoch seconds)

A client that leaves is noticed at once and gets its line, with reason "abort", in the book.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass
class Script:
    """How requests are treated."""

    tokens: int = 8
    """Per sequence, unless the request wants fewer."""
    prompt: int = 5
    cached: int = 0
    first_s: float = 0.0
    """Before the first token."""
    gap_s: float = 0.0
    """Between tokens."""
    together: bool = False
    """All events of a stream in one write."""
    status: int = 200
    message: str = "scripted"
    first_frame: bool = False
    """An error of `status` comes as the first event of a stream, not as the status of the response."""
    error_after: int | None = None
    """An error frame and `[DONE]` after so many tokens, as when EngineCore dies."""
    drop_after: int | None = None
    """The connection breaks after so many tokens (0: before the headers)."""
    exit_after: int | None = None
    """The whole engine dies by SIGKILL after so many tokens (0: before the headers)."""
    silent_end: bool = False
    """Streams end without `[DONE]`."""


@dataclass
class Asked:
    """One request, as it was received and how it went."""

    path: str
    request_id: str
    headers: dict[str, str]
    body: str
    began: float
    ended: float | None = None
    reason: str | None = None
    completion: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class FakeEngine:
    """All of it; one object a process."""

    def __init__(self, book: Path, served: str, slots: int, script: Script) -> None:
        self.book = os.open(book, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.served = served
        self.slots = asyncio.Semaphore(slots)
        self.script = script
        self.asked: list[Asked] = []
        self.running = 0
        self.waiting = 0
        self.numbers = itertools.count()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_post("/v1/completions", self.generate)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/fake/script", self.set_script)
        app.router.add_get("/fake/requests", self.requests)
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        labels = f'{{engine="0",model_name="{self.served}"}}'
        lines = [
            f"vllm:num_requests_running{labels} {float(self.running)}",
            f"vllm:num_requests_waiting{labels} {float(self.waiting)}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def set_script(self, request: web.Request) -> web.Response:
        self.script = Script(**await request.json())
        return web.json_response(asdict(self.script))

    async def requests(self, request: web.Request) -> web.Response:
        return web.json_response([asdict(asked) for asked in self.asked])

    # ------------------------------------------------------------------ generating

    async def generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.text()
        request_id = request.headers.get("X-Request-Id", f"random{next(self.numbers)}")
        asked = Asked(request.path, request_id, dict(request.headers), raw, time.time())
        self.asked.append(asked)
        script = self.script
        try:
            body = json.loads(raw)
        except json.JSONDecodeError:
            return error(400, "the body is no JSON")
        if body.get("model") != self.served:
            return error(404, f"The model `{body.get('model')}` does not exist.")
        if script.status != 200 and not script.first_frame:
            return error(script.status, script.message)
        self.break_off(request, script, 0)
        job = Job(self, asked, body, script)
        try:
            return await (job.stream(request) if body.get("stream") else job.whole(request))
        except BaseException as gone:
            job.end("abort" if isinstance(gone, asyncio.CancelledError | ConnectionError) else "error")
            raise

    def break_off(self, request: web.Request, script: Script, made: int) -> None:
        if script.exit_after == made:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.drop_after == made:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError("scripted")


class Job:
    """One HTTP request: as many sequences as `n` and prompts make."""

    def __init__(self, engine: FakeEngine, asked: Asked, body: dict[str, Any], script: Script) -> None:
        self.engine = engine
        self.asked = asked
        self.body = body
        self.script = script
        self.chat = asked.path == "/v1/chat/completions"
        prompt = body.get("prompt")
        self.prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
        self.sequences = self.prompts * (body.get("n") or 1)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or script.tokens
        self.tokens = min(script.tokens, limit)
        self.made = 0
        """Tokens of each sequence so far."""
        self.start_us = time.monotonic_ns() // 1000
        self.ended = False
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + asked.request_id
        self.head = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": engine.served,
        }

    async def steps(self, request: web.Request) -> Any:
        """Each token, when its time has come."""
        await asyncio.sleep(self.script.first_s)
        for number in range(self.tokens):
            if number:
                await asyncio.sleep(self.script.gap_s)
            self.made = number + 1
            yield number
            self.engine.break_off(request, self.script, self.made)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        async with Running(self.engine):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            pending: list[bytes] = []

            async def emit(payload: dict[str, Any] | str) -> None:
                text = payload if isinstance(payload, str) else dump(payload)
                pending.append(f"data: {text}\n\n".encode())
                if not self.script.together:
                    await response.write(pending.pop())

            if self.script.status != 200:
                await emit(json.dumps(error_body(self.script.status, self.script.message)))
                await emit("[DONE]")
                self.end("error")
                return response
            async for number in self.steps(request):
                if number == 0 and self.chat:
                    for index in range(self.sequences):
                        await emit(self.chunk(index, role=True))
                for index in range(self.sequences):
                    await emit(self.chunk(index))
                if self.made == self.script.error_after:
                    await emit(json.dumps(error_body(500, "EngineCore encountered an issue.")))
                    await emit("[DONE]")
                    await response.write(b"".join(pending))
                    self.end("error")
                    return response
            self.end("length")
            if not self.script.silent_end:
                if (self.body.get("stream_options") or {}).get("include_usage"):
                    await emit({**self.head, "choices": [], "usage": self.total()})
                await emit("[DONE]")
            await response.write(b"".join(pending))
            return response

    async def whole(self, request: web.Request) -> web.Response:
        async with Running(self.engine):
            async for _ in self.steps(request):
                pass
        self.end("length")
        text = "".join(word(n) for n in range(self.tokens))
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        head = {**self.head, "object": "chat.completion" if self.chat else "text_completion"}
        choices = [{**choice, "index": index} for index in range(self.sequences)]
        body = {**head, "choices": choices, "service_tier": None, "usage": self.total(), "kv_transfer_params": None}
        return web.Response(text=dump(body), content_type="application/json")

    def chunk(self, index: int, *, role: bool = False) -> dict[str, Any]:
        text = "" if role else word(self.made - 1)
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": ""} if role else {"content": text}
        else:
            choice["text"] = text
        last = self.made == self.tokens and not role
        choice |= {"logprobs": None, "finish_reason": "length" if last else None}
        chunk: dict[str, Any] = {**self.head, "choices": [choice]}
        options = self.body.get("stream_options") or {}
        if options.get("include_usage") and options.get("continuous_usage_stats"):
            made, prompt = (0 if role else self.made), self.script.prompt
            chunk["usage"] = {
                "prompt_tokens": prompt,
                "total_tokens": prompt + made,
                "completion_tokens": made,
                "completion_tokens_details": None,
            }
        return chunk

    def total(self) -> dict[str, Any]:
        prompt, completion = self.script.prompt * self.prompts, self.made * self.sequences
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": self.script.cached},
        }

    def end(self, reason: str) -> None:
        """Enter the book, once."""
        if self.ended:
            return
        self.ended = True
        now = time.time()
        self.asked.ended, self.asked.reason, self.asked.completion = now, reason, self.made * self.sequences
        each = self.sequences // self.prompts
        for index in range(self.sequences):
            first = index % each == 0
            line = {
                "request_id": self.asked.request_id,
                "engine_request_id": f"{self.id}-{index}",
                "prompt": self.script.prompt if first else 0,
                "cached": self.script.cached if index == 0 else 0,
                "completion": self.made,
                "reason": reason,
                "start_us": self.start_us,
                "end_us": time.monotonic_ns() // 1000,
                "at": now,
            }
            os.write(self.engine.book, json.dumps(line).encode() + b"\n")


class Running:
    """Counts a request as waiting until there is a slot, then as running."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    async def __aenter__(self) -> None:
        self.engine.waiting += 1
        try:
            await self.engine.slots.acquire()
        finally:
            self.engine.waiting -= 1
        self.engine.running += 1

    async def __aexit__(self, *exc_info: object) -> None:
        self.engine.running -= 1
        self.engine.slots.release()


def word(number: int) -> str:
    return f" w{number}"


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=dump(error_body(status, message)), content_type="application/json")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--book", required=True, type=Path)
    parser.add_argument("--served", required=True)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--script", type=json.loads, default={})
    arguments = parser.parse_args(argv)
    assert re.fullmatch(r"m-[0-9a-f]{16}", arguments.served)
    assert arguments.script.keys() <= {f.name for f in fields(Script)}
    return arguments


async def serve(arguments: argparse.Namespace) -> None:
    engine = FakeEngine(arguments.book, arguments.served, arguments.slots, Script(**arguments.script))
    runner = web.AppRunner(engine.app(), handler_cancellation=True, access_log=None, keepalive_timeout=5.0)
    await runner.setup()
    await web.UnixSite(runner, arguments.socket).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(parse(sys.argv[1:])))
