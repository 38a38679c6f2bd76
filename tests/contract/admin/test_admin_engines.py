from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest
from httpx import AsyncClient as Client

from app.admin.parts import AdminParts
from engines import commands, queries
from engines.model import (
    Device,
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    Fleet,
    ModelDigest,
    NodeId,
    PoolId,
    PoolStatus,
)

Pool: TypeAlias = "asyncpg.Pool[Any]"
ENGINES = "/admin/v1/engines"
SPEC = EngineSpec(model_digest=ModelDigest("a" * 64))
MISSING = "01890000-0000-7000-8000-0000000000ff"


def make_engine(number: int, **over: Any) -> Engine:
    fields: dict[str, Any] = {
        "id": EngineId(f"01890000-0000-7000-8000-{number:012x}"),
        "pool": SPEC.pool,
        "spec": SPEC,
        "state": EngineState.PLACED,
        "since": 100.0,
        "node": NodeId("n"),
        "device": DeviceId("n/mem"),
        "memory_bytes": 1_000,
        "epoch": 1,
        "created_at": 100.0,
        "caused_by": "acme/bot",
    }
    return Engine(**{**fields, **over})


@pytest.fixture
async def engines(db_pool: Pool) -> list[Engine]:
    """One that is placed, one that is over, one that has failed; oldest first."""
    epoch = await queries.raise_epoch(db_pool)
    placed, over, failed = (make_engine(number, epoch=epoch) for number in (1, 2, 3))
    for engine in (placed, over, failed):
        await queries.place_engine(db_pool, engine)
    after = msgspec.structs.replace(over, state=EngineState.STOPPED, since=101.0)
    await queries.change_engine(db_pool, EngineState.PLACED, after, epoch=epoch)
    starting = msgspec.structs.replace(failed, state=EngineState.STARTING, since=101.0, pid=42, pid_start=7)
    await queries.change_engine(db_pool, EngineState.PLACED, starting, epoch=epoch)
    dead = msgspec.structs.replace(starting, state=EngineState.FAILED, since=102.0, failure="exit status 1")
    await queries.change_engine(db_pool, EngineState.STARTING, dead, epoch=epoch, last_lines=("one", "two"))
    return [placed, over, failed]


def write_log(parts: AdminParts, engine: Engine, text: str, name: str = "log", mode: str = "w") -> None:
    folder = parts.logs.folder / engine.id
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open(mode) as log:
        log.write(text)


async def test_living_engines_come_newest_first_and_those_that_are_over_when_asked_for(
    admin: Client, engines: list[Engine]
) -> None:
    placed, over, failed = engines
    living = (await admin.get(ENGINES)).json()["data"]
    assert [engine["id"] for engine in living] == [failed.id, placed.id]
    first = (await admin.get(f"{ENGINES}?stopped=true&limit=2")).json()
    second = (await admin.get(f"{ENGINES}?stopped=true&limit=2&after={first['next']}")).json()
    assert [engine["id"] for engine in first["data"] + second["data"]] == [failed.id, over.id, placed.id]


async def test_an_engine_shows_why_it_failed_and_its_last_lines(admin: Client, engines: list[Engine]) -> None:
    shown = (await admin.get(f"{ENGINES}/{engines[2].id}")).json()
    assert shown == {
        "id": engines[2].id,
        "pool": SPEC.pool,
        "state": "failed",
        "since": "1970-01-01T00:01:42Z",
        "node": "n",
        "device": "n/mem",
        "memory_bytes": 1000,
        "slots": 16,
        "model_digest": "a" * 64,
        "arguments": msgspec.to_builtins(SPEC.arguments),
        "isolation": "shared",
        "caused_by": "acme/bot",
        "created_at": "1970-01-01T00:01:40Z",
        "ready_at": None,
        "start_s": None,
        "phases_us": {},
        "pid": 42,
        "failure": "exit status 1",
        "last_lines": ["one", "two"],
    }


@pytest.mark.parametrize("engine", [MISSING, "nonsense", "%2e%2e", "{01890000-0000-7000-8000-000000000001}x"])
async def test_an_engine_that_is_not_there_is_404(engine: str, admin: Client, engines: list[Engine]) -> None:
    for method, path in (("GET", ""), ("POST", "/stop"), ("GET", "/logs")):
        assert (await admin.request(method, f"{ENGINES}/{engine}{path}")).status_code == 404


async def test_a_cursor_that_is_no_engine_is_refused(admin: Client) -> None:
    response = await admin.get(f"{ENGINES}?after=eA")
    assert (response.status_code, response.json()["detail"]) == (400, "after: not a cursor of this API")


@pytest.mark.parametrize(("body", "force"), [(None, False), ({}, False), ({"force": True}, True)])
async def test_stopping_asks_the_controller(
    body: Any, force: bool, admin: Client, engines: list[Engine], db_pool: Pool
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with db_pool.acquire() as connection:
        listener: Any = lambda *arguments: heard.put_nowait(arguments[3])  # noqa: E731
        await connection.add_listener(commands.CHANNEL, listener)
        response = await admin.post(f"{ENGINES}/{engines[0].id}/stop", json=body)
        assert commands.decode(await heard.get()) == commands.Stop(engines[0].id, force=force)
        await connection.remove_listener(commands.CHANNEL, listener)
    assert (response.status_code, response.json()["state"]) == (202, "placed")


async def test_stopping_what_is_over_changes_nothing(admin: Client, engines: list[Engine]) -> None:
    response = await admin.post(f"{ENGINES}/{engines[1].id}/stop")
    assert (response.status_code, response.json()["state"]) == (200, "stopped")


async def test_a_log_can_be_read_from_its_end_and_followed(
    admin: Client, engines: list[Engine], parts: AdminParts
) -> None:
    path = f"{ENGINES}/{engines[0].id}/logs"
    write_log(parts, engines[0], "one\ntwo\nthree\n")
    tail = (await admin.get(f"{path}?lines=2")).json()
    assert tail["lines"] == ["two", "three"]
    write_log(parts, engines[0], "four\nfi", mode="a")
    more = (await admin.get(f"{path}?after={tail['position']}")).json()
    assert more["lines"] == ["four"]
    write_log(parts, engines[0], "ve\n", mode="a")
    rest = (await admin.get(f"{path}?after={more['position']}")).json()
    assert rest["lines"] == ["five"]


async def test_without_a_log_file_the_last_lines_that_were_kept_are_shown(admin: Client, engines: list[Engine]) -> None:
    assert (await admin.get(f"{ENGINES}/{engines[2].id}/logs")).json() == {"lines": ["one", "two"], "position": ""}
    assert (await admin.get(f"{ENGINES}/{engines[2].id}/logs?lines=1")).json()["lines"] == ["two"]
    assert (await admin.get(f"{ENGINES}/{engines[0].id}/logs")).json() == {"lines": [], "position": ""}


async def test_the_fleet_shows_what_is_reserved_of_each_device(admin: Client, surroundings: Any) -> None:
    response = await admin.get("/admin/v1/fleet")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")

    surroundings.fleet = Fleet(
        epoch=3,
        version=9,
        at=100.0,
        engines=(make_engine(1, state=EngineState.READY), make_engine(2, state=EngineState.ASLEEP)),
        pools=(PoolStatus(pool=PoolId(SPEC.pool), desired=1, start_s=2.5),),
        devices=(
            Device(id=DeviceId("n/mem"), node=NodeId("n"), memory_bytes=5_000),
            Device(id=DeviceId("n/gpu0"), node=NodeId("n"), memory_bytes=7_000),
        ),
    )
    assert (await admin.get("/admin/v1/fleet")).json() == {
        "epoch": 3,
        "version": 9,
        "at": "1970-01-01T00:01:40Z",
        "devices": [
            {"id": "n/mem", "node": "n", "memory_bytes": 5000, "reserved_bytes": 1000},
            {"id": "n/gpu0", "node": "n", "memory_bytes": 7000, "reserved_bytes": 0},
        ],
        "pools": [{"pool": SPEC.pool, "desired": 1, "start_s": 2.5, "failure": None, "blocked": None}],
        "engines": {"ready": 1, "asleep": 1},
    }
