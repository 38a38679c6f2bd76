"""Gateways for tests: real sockets, real Postgres, engines that are programs; and what a test may do to them."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import aiohttp
import asyncpg
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from uuid_utils import uuid7

from app.drain import Drain
from app.metrics import Metrics
from app.parts import GatewayParts
from app.settings import GatewaySettings
from app.telemetry import Telemetry
from engines.admission import Admission
from engines.arguments import served_name
from engines.catalog import Catalog
from engines.client import EngineClient
from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineState,
    Fleet,
    GatewayId,
    Model,
    ModelDigest,
    NodeId,
    PoolStatus,
    RequestDefaults,
    RuntimeArguments,
    Scaling,
    Variant,
)
from tenants import queries
from tenants.auth import Authenticator
from tenants.keys import RANDOM_BYTES, KeyKind, digest, generate
from tenants.ledger import Ledger

Pool: TypeAlias = "asyncpg.Pool[Any]"

PROGRAM = Path(__file__).parent / "fake_engine.py"
PEPPER = b"p" * 32
SLOTS = 4
MODEL = Model(
    name="tiny",
    digest=ModelDigest("0123456789abcdef" * 4),
    architecture="X",
    weights_bytes=1,
    parameters=1,
    max_model_len=64,
    kv_bytes_per_token=1,
    dtype="bfloat16",
    source="test",
)
SERVED = served_name(MODEL.digest)


def variant(workspace: str, name: str, **fields: Any) -> Variant:
    said: dict[str, Any] = {
        "workspace": workspace,
        "name": name,
        "model": MODEL,
        "arguments": RuntimeArguments(max_num_seqs=SLOTS),
        "scaling": Scaling(),
        "defaults": RequestDefaults(),
    }
    return Variant(**{**said, **fields})


BOT = variant("acme", "bot")


@dataclass
class FakeEngine:
    """A running fake engine and its place in the fleet."""

    id: EngineId
    socket: Path
    book: Path
    process: asyncio.subprocess.Process
    state: EngineState = EngineState.READY

    def described(self) -> Engine:
        return Engine(
            id=self.id,
            pool=BOT.spec.pool,
            spec=BOT.spec,
            state=self.state,
            since=time.time(),
            node=NodeId("n"),
            device=DeviceId("n/mem"),
            memory_bytes=1,
            epoch=1,
            created_at=time.time(),
            address=str(self.socket),
            ready_at=time.time(),
            phases_us={"fork": 1000, "listening": 2000},
        )

    async def script(self, **script: Any) -> None:
        """How it treats requests from now on."""
        async with self._session() as session, session.post("http://engine/fake/script", json=script) as answer:
            assert answer.status == 200, await answer.text()

    async def asked(self) -> list[dict[str, Any]]:
        """What it was asked so far."""
        async with self._session() as session, session.get("http://engine/fake/requests") as answer:
            asked: list[dict[str, Any]] = await answer.json()
            return asked

    def lines(self) -> list[dict[str, Any]]:
        """Its book."""
        return [json.loads(line) for line in self.book.read_text().splitlines()]

    async def book_line(self) -> dict[str, Any]:
        """The one line of its book, once it is there."""
        await until(lambda: len(self.lines()) > 0)
        (line,) = self.lines()
        return line

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket)))


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that will be so soon."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


def listens(path: Path) -> bool:
    """Does anybody take connections there? The file alone says only that somebody is about to."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@dataclass
class Gateway:
    """A running gateway, its clients, and what a test may do to its surroundings."""

    parts: GatewayParts
    pool: Pool
    directory: Path
    key: str
    other_key: str
    session: aiohttp.ClientSession
    url: str
    operators: str
    serving: asyncio.Task[None]
    spans: InMemorySpanExporter
    engines: list[FakeEngine] = field(default_factory=list)
    version: int = 0

    async def engine(self, **script: Any) -> FakeEngine:
        """Start an engine and publish it as READY."""
        engine = await self.start_engine(**script)
        self.publish()
        return engine

    async def start_engine(self, **script: Any) -> FakeEngine:
        engine_id = EngineId(str(uuid7()))
        path, book = self.directory / engine_id[-6:], self.directory / f"{engine_id[-6:]}.jsonl"
        arguments = ["--socket", str(path), "--book", str(book), "--served", SERVED, "--script", json.dumps(script)]
        process = await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), *arguments)
        engine = FakeEngine(engine_id, path, book, process)
        self.engines.append(engine)
        await until(lambda: listens(path))
        return engine

    def publish(self, *, status: PoolStatus | None = None) -> None:
        """Have the gateway follow the fleet as it is."""
        self.version += 1
        fleet = Fleet(
            epoch=1,
            version=self.version,
            at=time.time(),
            engines=tuple(engine.described() for engine in self.engines),
            pools=() if status is None else (status,),
        )
        self.parts.admission.fleet_changed(fleet)
        self.parts.client.fleet_changed(fleet)

    def post(self, path: str = "/v1/chat/completions", *, key: str | None = None, **fields: Any) -> Any:
        """A request; used as a context manager."""
        body: dict[str, Any] = {"model": "bot", **fields}
        if path == "/v1/chat/completions":
            body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return self.session.post(f"{self.url}{path}", json=body, headers=self.auth(key))

    def auth(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key or self.key}"}

    async def events(self, **fields: Any) -> list[Any]:
        """A stream read to its end: decoded chunks and `"[DONE]"`."""
        async with self.post(stream=True, **fields) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            return events(await answer.read())

    async def ended(self, count: int = 1) -> list[dict[str, Any]]:
        """The ledger's events, once there are so many and nothing is open but what waits for a book."""
        async with asyncio.timeout(10):
            while True:
                rows = [dict(row) for row in await self.pool.fetch("SELECT * FROM usage_event ORDER BY attempt")]
                pending = await self.pool.fetch("SELECT pending FROM usage_open WHERE pending IS NOT NULL")
                unsettled = await self.pool.fetchval("SELECT count(*) FROM usage_open WHERE pending IS NULL")
                if len(rows) + len(pending) >= count and not unsettled:
                    return rows + [{"pending": json.loads(row["pending"])} for row in pending]
                await asyncio.sleep(0.005)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.parts.drain.begin()
        self.parts.drain.hurry()
        await self.session.close()
        await self.serving
        await self.parts.client.close()
        for engine in self.engines:
            if engine.process.returncode is None:
                engine.process.kill()
            await engine.process.wait()


def events(data: bytes) -> list[Any]:
    """A whole stream, taken apart strictly: nothing but `data:` events, each followed by a blank line."""
    assert data.endswith(b"\n\n")
    payloads = [event.removeprefix(b"data: ") for event in data[:-2].split(b"\n\n")]
    return ["[DONE]" if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


async def make_key(pool: Pool, workspace: str) -> str:
    await queries.create_workspace(pool, workspace)
    key = generate(KeyKind.WORKSPACE, secrets.token_bytes(RANDOM_BYTES))
    await queries.create_key(pool, workspace, key.id, digest(PEPPER, key))
    return key.text


async def end_ledger(parts: GatewayParts, ledger: asyncio.Task[None]) -> None:
    await parts.ledger.drain(5)
    ledger.cancel()
    await asyncio.wait({ledger})


def gateway_parts(pool: Pool, settings: GatewaySettings, spans: InMemorySpanExporter) -> GatewayParts:
    instance = GatewayId(str(uuid7()))
    client = EngineClient(silence_s=settings.engine_read_s)
    admission = Admission(
        instance, queue_length=settings.queue_length, poke=lambda: None, healthy=client.healthy, clock=time.time
    )
    drain = Drain(settings.drain_s)
    drain.on_begin(admission.close)
    return GatewayParts(
        gateway=instance,
        settings=settings,
        authenticator=Authenticator(pool, PEPPER),
        catalog=Catalog(pool),
        admission=admission,
        client=client,
        ledger=Ledger(pool, instance),
        drain=drain,
        telemetry=Telemetry("test", instance, processor=SimpleSpanProcessor(spans)),
        metrics=Metrics(),
        clock=time.time,
    )


Start: TypeAlias = Callable[..., Awaitable[Gateway]]
"""Starts a gateway; what is passed are its settings."""
