"""Commands as they are typed, against a real admin API on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import asyncpg
import pytest
import uvicorn
from click.testing import CliRunner
from litestar import Litestar

from app.admin.parts import AdminParts
from app.admin.routes import admin_routes
from app.cli import greenroom
from engines.logs import EngineLogs
from engines.model import Device, DeviceId, NodeId
from tenants import queries
from tenants.auth import Authenticator
from tenants.keys import RANDOM_BYTES, KeyKind, digest, generate

Pool: TypeAlias = "asyncpg.Pool[Any]"
PEPPER = b"p" * 32


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str
    """What it printed on stderr, or the line that `greenroom` would print there."""

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs `greenroom …` in a thread, as a process of its own would run, with settings of its own."""

    def __init__(self, env: dict[str, str], data_dir: Path) -> None:
        self.env = env
        self.data_dir = data_dir

    async def __call__(self, *arguments: str, stdin: str = "") -> Done:
        return await asyncio.to_thread(self._run, arguments, stdin)

    def _run(self, arguments: tuple[str, ...], stdin: str) -> Done:
        result = CliRunner().invoke(greenroom, list(arguments), input=stdin, env=self.env)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return Done(1, result.stdout, f"{type(result.exception).__name__}: {result.exception}")
        return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def parts(db_pool: Pool, tmp_path: Path) -> AdminParts:
    return AdminParts(
        pool=db_pool,
        authenticator=Authenticator(db_pool, PEPPER),
        pepper=PEPPER,
        fleet=lambda: None,
        expected_devices=(Device(id=DeviceId("n/mem"), node=NodeId("n"), memory_bytes=3_000_000_000),),
        models_path=tmp_path / "data" / "models",
        logs=EngineLogs(tmp_path / "data" / "engines"),
    )


@pytest.fixture
async def cli(parts: AdminParts, db_pool: Pool, tmp_path: Path) -> AsyncIterator[Cli]:
    """The command line of an operator."""
    key = generate(KeyKind.OPERATOR, secrets.token_bytes(RANDOM_BYTES))
    await queries.create_key(db_pool, None, key.id, digest(PEPPER, key))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin-key").write_text(key.text + "\n")
    async with serving(Litestar([admin_routes(parts)])) as url:
        yield Cli({"GREENROOM_DATA_DIR": str(tmp_path / "data"), "GREENROOM_ADMIN_URL": url}, tmp_path / "data")


@contextlib.asynccontextmanager
async def serving(app: Litestar) -> AsyncIterator[str]:
    """An app on a free port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
