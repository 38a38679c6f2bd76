from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest

from engines import commands, queries
from engines.catalog import CHANNEL, Catalog
from engines.errors import Conflict, NotFound
from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineState,
    Model,
    ModelDigest,
    NodeId,
    RequestDefaults,
    RuntimeArguments,
    Scaling,
    Variant,
)

Pool: TypeAlias = "asyncpg.Pool[Any]"


def make_model(name: str = "tiny", digest: str = "a" * 64) -> Model:
    return Model(
        name=name,
        digest=ModelDigest(digest),
        architecture="LlamaForCausalLM",
        weights_bytes=1000,
        parameters=500,
        max_model_len=4096,
        kv_bytes_per_token=256,
        dtype="bfloat16",
        source="/models/tiny",
    )


def make_variant(workspace: str, name: str, model: Model | None = None, **over: Any) -> Variant:
    return Variant(workspace=workspace, name=name, model=model or make_model(), **over)


@pytest.fixture
async def pool(db_pool: Pool) -> Pool:
    await db_pool.execute("INSERT INTO workspace (name) VALUES ('acme'), ('other')")
    assert await queries.create_model(db_pool, make_model())
    return db_pool


async def test_a_model_is_stored_once_under_its_name(pool: Pool) -> None:
    assert not await queries.create_model(pool, make_model(digest="b" * 64))
    record = await queries.model_record(pool, "tiny")
    assert record is not None
    assert record.model == make_model()
    assert await queries.model_record(pool, "gone") is None


async def test_models_come_by_name_and_in_pages(pool: Pool) -> None:
    for name in ("zebra", "ant"):
        await queries.create_model(pool, make_model(name))
    assert [record.model.name for record in await queries.model_records(pool)] == ["ant", "tiny", "zebra"]
    assert [record.model.name for record in await queries.model_records(pool, after="ant", limit=1)] == ["tiny"]


async def test_a_model_in_use_stays(pool: Pool) -> None:
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    with pytest.raises(Conflict, match="model tiny is in use: variants name it"):
        await queries.delete_model(pool, "tiny")
    await queries.delete_variant(pool, "acme", "bot")

    engine = Engine(
        id=EngineId("01890000-0000-7000-8000-000000000001"),
        pool=make_variant("acme", "bot").spec.pool,
        spec=make_variant("acme", "bot").spec,
        state=EngineState.PLACED,
        since=1.0,
        node=NodeId("n"),
        device=DeviceId("n/mem"),
        memory_bytes=1,
        epoch=await queries.raise_epoch(pool),
        created_at=1.0,
    )
    await queries.place_engine(pool, engine)
    with pytest.raises(Conflict, match=f"model tiny is in use: engine {engine.id} runs it"):
        await queries.delete_model(pool, "tiny")

    stopped = msgspec.structs.replace(engine, state=EngineState.STOPPED, since=2.0)
    await queries.change_engine(pool, EngineState.PLACED, stopped, epoch=engine.epoch)
    assert await queries.digest_is_named(pool, make_model().digest)
    assert await queries.delete_model(pool, "tiny") == make_model().digest
    assert not await queries.digest_is_named(pool, make_model().digest)
    with pytest.raises(NotFound, match="model tiny does not exist"):
        await queries.delete_model(pool, "tiny")


async def test_a_variant_comes_back_as_it_was_stored(pool: Pool) -> None:
    variant = make_variant(
        "acme",
        "bot",
        defaults=RequestDefaults(system_prompt="Be brief.", temperature=0.5),
        scaling=Scaling(idle_timeout_s=5, provisioned=2),
        arguments=RuntimeArguments(max_num_seqs=4),
        dedicated=True,
    )
    assert await queries.create_variant(pool, "acme", variant)
    assert not await queries.create_variant(pool, "acme", variant)
    stored = await queries.variant(pool, "acme", "bot")
    assert stored is not None
    assert msgspec.structs.replace(stored, created_at=0.0) == variant

    changed = msgspec.structs.replace(variant, scaling=Scaling(), dedicated=False)
    await queries.update_variant(pool, "acme", changed)
    stored = await queries.variant(pool, "acme", "bot")
    assert stored is not None
    assert msgspec.structs.replace(stored, created_at=0.0) == changed


async def test_i7_a_workspace_has_only_its_own_variants(pool: Pool) -> None:
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    await queries.create_variant(pool, "other", make_variant("other", "secret"))
    assert [variant.name for variant in await queries.variants(pool, "acme")] == ["bot"]
    assert await queries.variant(pool, "acme", "secret") is None
    with pytest.raises(NotFound, match="workspace acme has no variant secret"):
        await queries.delete_variant(pool, "acme", "secret")
    with pytest.raises(NotFound, match="workspace acme has no variant secret"):
        await queries.update_variant(pool, "acme", make_variant("acme", "secret"))


async def test_what_a_variant_needs_must_exist(pool: Pool) -> None:
    with pytest.raises(NotFound, match="workspace gone does not exist"):
        await queries.create_variant(pool, "gone", make_variant("gone", "bot"))
    with pytest.raises(NotFound, match="model gone does not exist"):
        await queries.create_variant(pool, "acme", make_variant("acme", "bot", make_model("gone")))


async def test_the_catalog_follows_notifications_and_leaves_disabled_workspaces_out(pool: Pool) -> None:
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    catalog = Catalog(pool)
    changes: asyncio.Queue[list[str]] = asyncio.Queue()
    catalog.subscribe(lambda variants: changes.put_nowait([f"{v.workspace}/{v.name}" for v in variants]))
    await catalog.load()
    assert await changes.get() == ["acme/bot"]

    running = asyncio.create_task(catalog.run())
    async with pool.acquire() as connection:
        listener: Any = lambda *arguments: catalog.notified(arguments[3])  # noqa: E731
        await connection.add_listener(CHANNEL, listener)
        await queries.create_variant(pool, "other", make_variant("other", "bot"))
        assert await changes.get() == ["acme/bot", "other/bot"]
        assert catalog.get("other", "bot") is not None
        assert catalog.get("acme", "nothing") is None
        assert [variant.name for variant in catalog.of("acme")] == ["bot"]
        assert catalog.of("nobody") == ()

        await pool.execute("UPDATE workspace SET disabled_at = now() WHERE name = 'acme'")
        await queries.notify_catalog(pool)
        assert await changes.get() == ["other/bot"]

        await queries.delete_variant(pool, "other", "bot")
        assert await changes.get() == []
        await connection.remove_listener(CHANNEL, listener)
    running.cancel()


async def test_a_variant_is_found_before_its_notification_is_here(pool: Pool) -> None:
    catalog = Catalog(pool)
    loads: list[int] = []
    catalog.subscribe(lambda variants: loads.append(len(variants)))
    await catalog.load()
    running = asyncio.create_task(catalog.run())
    assert await catalog.find("acme", "bot") is None
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    found = await asyncio.gather(*(catalog.find("acme", name) for name in ("bot", "bot", "other", "bot\0", "no\ud800")))
    assert [variant and variant.name for variant in found] == ["bot", "bot", None, None, None]
    assert await catalog.find("other", "bot") is None
    assert loads == [1]

    await queries.create_variant(pool, "other", make_variant("other", "late"))
    await pool.execute("UPDATE workspace SET disabled_at = now() WHERE name = 'other'")
    await queries.create_variant(pool, "acme", make_variant("acme", "late"))
    assert await catalog.find("acme", "nothing") is None
    assert await catalog.find("other", "late") is None
    assert catalog.get("acme", "late") is None, "everything was loaded for a name that isn't there"
    running.cancel()


async def test_what_is_not_known_is_not_found_while_postgres_is_away(pool: Pool, database: str) -> None:
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as own:
        catalog = Catalog(own)
        await catalog.load()
    running = asyncio.create_task(catalog.run())
    assert await catalog.find("acme", "bot") is not None
    assert await catalog.find("acme", "other") is None
    assert not running.done()
    running.cancel()


async def test_a_load_that_finds_nothing_new_tells_nobody(pool: Pool) -> None:
    catalog = Catalog(pool)
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    heard: list[int] = []
    catalog.subscribe(lambda variants: heard.append(len(variants)))
    await catalog.load()
    await catalog.load()
    assert heard == [1]


async def test_the_catalog_keeps_what_it_knows_while_postgres_is_away(pool: Pool, database: str) -> None:
    await queries.create_variant(pool, "acme", make_variant("acme", "bot"))
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as own:
        catalog = Catalog(own)
        await catalog.load()
    with pytest.raises(asyncpg.InterfaceError):
        await catalog.load()
    assert catalog.get("acme", "bot") is not None


@pytest.mark.parametrize(
    "command", [commands.Stop(EngineId("e"), force=True), commands.Prewarm("acme", "bot"), commands.Stop(EngineId("e"))]
)
async def test_a_command_reaches_whoever_listens(pool: Pool, command: commands.Command) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with pool.acquire() as connection:
        listener: Any = lambda *arguments: heard.put_nowait(arguments[3])  # noqa: E731
        await connection.add_listener(commands.CHANNEL, listener)
        await queries.send_command(pool, command)
        assert commands.decode(await heard.get()) == command
        await connection.remove_listener(commands.CHANNEL, listener)


@pytest.mark.parametrize("payload", ["", "{}", '{"op": "dance"}', '{"op": "stop"}', "[" * 5000])
def test_a_payload_that_is_no_command_is_nothing(payload: str) -> None:
    assert commands.decode(payload) is None
