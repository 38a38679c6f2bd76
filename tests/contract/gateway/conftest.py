"""A gateway as its clients and its engines meet it: real sockets, real Postgres, engines that are programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateways import BOT, MODEL, Gateway, Pool, Start, end_ledger, gateway_parts, make_key, variant
from litestar import Litestar
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app import health, server
from app.openai.routes import tenant_app
from app.settings import GatewaySettings
from engines import queries as engine_queries
from engines.model import RequestDefaults, Scaling


@pytest.fixture
async def start(db_pool: Pool, short_dir: Path) -> AsyncIterator[Start]:
    """Starts a gateway; what is passed are its settings."""
    async with contextlib.AsyncExitStack() as stack:

        async def begin(**settings: Any) -> Gateway:
            key, other_key = await make_key(db_pool, "acme"), await make_key(db_pool, "other")
            await engine_queries.create_model(db_pool, MODEL)
            variants = (
                BOT,
                variant("acme", "polite", defaults=RequestDefaults(system_prompt="Be kind.", max_tokens=2)),
                variant("acme", "narrow", scaling=Scaling(max_concurrency=1)),
                variant("other", "secret"),
            )
            for each in variants:
                await engine_queries.create_variant(db_pool, each.workspace, each)
            spans = InMemorySpanExporter()
            parts = gateway_parts(db_pool, GatewaySettings(**{"drain_s": 0.5, **settings}), spans)
            await parts.catalog.load()
            catalog = asyncio.create_task(parts.catalog.run())
            stack.callback(catalog.cancel)
            ledger = asyncio.create_task(parts.ledger.run())
            stack.push_async_callback(end_ledger, parts, ledger)
            tenants, operators = server.listen("127.0.0.1", 0), server.listen("127.0.0.1", 0)
            urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (tenants, operators)]
            inside = Litestar([*health.routes(parts), health.metrics_route(parts)], openapi_config=None)
            serving = asyncio.create_task(server.run([(tenant_app(parts), tenants), (inside, operators)], parts.drain))
            session = aiohttp.ClientSession()
            gateway = Gateway(parts, db_pool, short_dir, key, other_key, session, *urls, serving, spans)
            return await stack.enter_async_context(gateway)

        yield begin


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway with the usual settings."""
    return await start()
