"""Fixtures that stand for the machine: a real Postgres and Valkey, once a session, with fresh contents per test."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.installs import postgres_install
from app.migrate import migrate
from app.settings import Settings
from app.stores import EmbeddedPostgres, EmbeddedValkey

TEMPLATE = "greenroom_template"


def _short_directory() -> Path:
    """Short, for Unix sockets, and open to pass through, since as root Postgres runs as `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    path.chmod(0o711)
    return path


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A new directory with a short name, for sockets and data directories."""
    path = _short_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A Postgres for the session (fsync off); use `database` for a database of your own."""
    directory = _short_directory()
    server = EmbeddedPostgres(directory / "postgres", directory / "pg", durable=False)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory)


def psql(server: EmbeddedPostgres, sql: str, database: str = "postgres") -> str:
    """Run one statement synchronously, so that no event loop is needed; its unaligned output."""
    done = subprocess.run(
        [postgres_install() / "bin" / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", server.url(database), "-c", sql],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def _template(postgres: EmbeddedPostgres) -> str:
    """A migrated database that others are copied from."""
    directory = _short_directory()
    psql(postgres, f"CREATE DATABASE {TEMPLATE}")
    with asyncio.Runner() as runner:
        runner.run(migrate(Settings(data_dir=str(directory), database_url=postgres.url(TEMPLATE))))
    psql(postgres, "DELETE FROM api_key", TEMPLATE)
    shutil.rmtree(directory)
    return TEMPLATE


@pytest.fixture
def empty_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """URL of a new database without any table."""
    name = f"t_{secrets.token_hex(6)}"
    psql(postgres, f"CREATE DATABASE {name}")
    yield postgres.url(name)
    psql(postgres, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def database(postgres: EmbeddedPostgres, _template: str) -> Iterator[str]:
    """URL of a new, migrated database with an installation id of its own and no keys."""
    name = f"t_{secrets.token_hex(6)}"
    psql(postgres, f"CREATE DATABASE {name} TEMPLATE {_template} STRATEGY FILE_COPY")
    psql(postgres, f"UPDATE installation SET id = '{secrets.token_hex(4)}'", name)
    yield postgres.url(name)
    psql(postgres, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
async def db_pool(database: str) -> AsyncIterator[asyncpg.Pool[Any]]:
    """A pool of connections to `database`."""
    async with asyncpg.create_pool(database, min_size=1, max_size=10) as pool:
        yield pool


@pytest.fixture(scope="session")
def _session_valkey() -> Iterator[EmbeddedValkey]:
    directory = _short_directory()
    server = EmbeddedValkey(directory / "valkey.sock")
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory)


@pytest.fixture
def valkey(_session_valkey: EmbeddedValkey) -> str:
    """URL of the session's Valkey, empty."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(_session_valkey.url.removeprefix("unix://"))
        client.sendall(b"FLUSHALL\r\n")
        assert client.recv(64) == b"+OK\r\n"
    return _session_valkey.url


@pytest.fixture
def valkey_server(short_dir: Path) -> Iterator[EmbeddedValkey]:
    """A Valkey of the test's own, started, that it may stop, kill and start again."""
    server = EmbeddedValkey(short_dir / "valkey.sock")
    server.start()
    yield server
    server.stop()


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The engine environment's Python (`./dev setup` makes it)."""
    path = ROOT / ".venv-engine" / "bin" / "python"
    if not path.exists():
        pytest.skip("there is no engine environment: run ./dev setup")
    return path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder (`./dev setup` makes it)."""
    path = ROOT / "var" / "models" / "smollm2-135m"
    if not (path / "config.json").exists():
        pytest.skip("there is no demo model: run ./dev setup")
    return path
