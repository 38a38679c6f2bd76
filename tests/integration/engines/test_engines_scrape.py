"""An engine asked over its Unix socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from engines import scrape

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


class Engine:
    """A server at a socket that answers /metrics as a test says."""

    def __init__(self, address: Path) -> None:
        self.address = str(address)
        self.answer: Callable[[], Awaitable[web.Response]] = self.metrics
        self.text = f'{RUNNING}{{engine="0"}} 2.0\n{WAITING}{{engine="0"}} 1.0\n{WAITING}_by_reason{{engine="0"}} 1.0\n'

    async def metrics(self) -> web.Response:
        return web.Response(text=self.text)

    async def handle(self, request: web.Request) -> web.Response:
        assert request.path == "/metrics"
        return await self.answer()


@pytest.fixture
async def engine(short_dir: Path) -> AsyncIterator[Engine]:
    made = Engine(short_dir / "s")
    runner = web.ServerRunner(web.Server(made.handle))  # type: ignore[arg-type]
    await runner.setup()
    await web.UnixSite(runner, made.address).start()
    yield made
    await runner.cleanup()


async def test_what_runs_and_what_waits_is_in_flight(engine: Engine) -> None:
    assert await scrape.in_flight(engine.address) == 3


async def test_an_idle_engine_has_nothing_in_flight(engine: Engine) -> None:
    engine.text = f"{RUNNING} 0.0\n{WAITING} 0.0\n"
    assert await scrape.in_flight(engine.address) == 0


@pytest.mark.parametrize("text", ["", f"{RUNNING} 0.0\n", f"{RUNNING} 0.0\n{WAITING} none\n"])
async def test_an_answer_that_does_not_say_is_no_answer(engine: Engine, text: str) -> None:
    engine.text = text
    assert await scrape.in_flight(engine.address) is None


async def test_an_error_is_no_answer(engine: Engine) -> None:
    async def fails() -> web.Response:
        return web.Response(status=503, text=engine.text)

    engine.answer = fails
    assert await scrape.in_flight(engine.address) is None


async def test_an_engine_that_does_not_answer_in_time_is_no_answer(engine: Engine) -> None:
    never = asyncio.Event()

    async def hangs() -> web.Response:
        await never.wait()
        return web.Response()

    engine.answer = hangs
    began = time.monotonic()
    assert await scrape.in_flight(engine.address, patience_s=0.05) is None
    assert time.monotonic() - began < 1.0
    never.set()


async def test_nobody_at_the_address_is_no_answer(short_dir: Path) -> None:
    assert await scrape.in_flight(str(short_dir / "nobody")) is None
