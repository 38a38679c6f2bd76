"""The admin API as an operator meets it: real Postgres, real keys, no other process."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from tiny_model import write_model

from app.admin.parts import AdminParts
from app.admin.routes import admin_routes
from engines import modelstore
from engines.logs import EngineLogs
from engines.model import Device, DeviceId, Fleet, Model, NodeId
from tenants import queries
from tenants.auth import Authenticator
from tenants.keys import RANDOM_BYTES, KeyKind, digest, generate

Pool: TypeAlias = "asyncpg.Pool[Any]"
Client: TypeAlias = AsyncClient

NOW = 1_795_000_000.0
PEPPER = b"p" * 32
DEVICE = Device(id=DeviceId("n/mem"), node=NodeId("n"), memory_bytes=3_000_000_000)


class Surroundings:
    """What a test may change of what the admin API sees."""

    def __init__(self) -> None:
        self.fleet: Fleet | None = None
        self.now = NOW


@pytest.fixture
def surroundings() -> Surroundings:
    return Surroundings()


@pytest.fixture
def parts(db_pool: Pool, tmp_path: Path, surroundings: Surroundings) -> AdminParts:
    return AdminParts(
        pool=db_pool,
        authenticator=Authenticator(db_pool, PEPPER, clock=lambda: surroundings.now),
        pepper=PEPPER,
        fleet=lambda: surroundings.fleet,
        expected_devices=(DEVICE,),
        max_engines_per_pool=4,
        models_path=tmp_path / "models",
        logs=EngineLogs(tmp_path / "engines"),
        clock=lambda: surroundings.now,
    )


@pytest.fixture
def app(parts: AdminParts) -> Litestar:
    return Litestar([admin_routes(parts)])


@pytest.fixture
async def anonymous(app: Litestar) -> AsyncIterator[Client]:
    """A client without a key, on the test's own event loop."""
    transport = ASGITransport(app)  # type: ignore[arg-type]
    async with AsyncClient(transport=transport, base_url="http://greenroom") as client:
        yield client


@pytest.fixture
async def admin(anonymous: Client, db_pool: Pool) -> Client:
    """A client with an operator's key."""
    key = generate(KeyKind.OPERATOR, secrets.token_bytes(RANDOM_BYTES))
    await queries.create_key(db_pool, None, key.id, digest(PEPPER, key))
    anonymous.headers["Authorization"] = f"Bearer {key.text}"
    return anonymous


@pytest.fixture
async def acme(admin: Client) -> Client:
    """The same, with a workspace `acme`."""
    assert (await admin.post("/admin/v1/workspaces", json={"name": "acme"})).status_code == 201
    return admin


@pytest.fixture
def stored(parts: AdminParts, tmp_path: Path) -> Model:
    """A tiny model in the store."""
    package = modelstore.inspect(write_model(tmp_path / "tiny"))
    return modelstore.put(package, parts.models_path, name="tiny", source="/from", progress=lambda *_: None)


@pytest.fixture
async def tiny(acme: Client, stored: Model) -> Client:
    """The same, with a model `tiny`."""
    body = {"name": "tiny", "digest": stored.digest}
    assert (await acme.post("/admin/v1/models", json=body)).status_code == 201
    return acme
