from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest
from httpx import ASGITransport
from httpx import AsyncClient as Client
from litestar import Litestar

from app.admin.parts import AdminParts
from app.admin.routes import admin_routes
from engines import commands
from engines.catalog import CHANNEL
from engines.footprint import OVERHEAD_BYTES
from engines.model import Device, DeviceId, Fleet, NodeId

Pool: TypeAlias = "asyncpg.Pool[Any]"
VARIANTS = "/admin/v1/workspaces/acme/variants"
BOT: dict[str, Any] = {"name": "bot", "model": "tiny"}


class Listener:
    """What Postgres notified of, on one channel."""

    def __init__(self, pool: Pool, channel: str) -> None:
        self._pool, self._channel = pool, channel
        self.heard: asyncio.Queue[str] = asyncio.Queue()

    async def __aenter__(self) -> asyncio.Queue[str]:
        self._connection = await self._pool.acquire()
        await self._connection.add_listener(self._channel, self._received)
        return self.heard

    async def __aexit__(self, *_: object) -> None:
        await self._connection.remove_listener(self._channel, self._received)
        await self._pool.release(self._connection)

    def _received(self, *arguments: Any) -> None:
        self.heard.put_nowait(arguments[3])


async def test_a_variant_is_made_with_defaults_and_again_changes_nothing(tiny: Client, db_pool: Pool) -> None:
    async with Listener(db_pool, CHANNEL) as heard:
        made = await tiny.post(VARIANTS, json=BOT)
        assert await heard.get() == "acme/bot"
    again = await tiny.post(VARIANTS, json=BOT)
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json() == again.json() == (await tiny.get(f"{VARIANTS}/bot")).json()
    assert made.json() == {
        "workspace": "acme",
        "name": "bot",
        "model": "tiny",
        "defaults": {},
        "scaling": {"idle_timeout_s": 600.0, "provisioned": 0, "max_concurrency": None},
        "arguments": {
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "kv_cache_bytes": 268435456,
            "dtype": "auto",
            "enforce_eager": True,
            "threads": 1,
        },
        "dedicated": False,
        "pool": made.json()["pool"],
        "footprint": {
            "weights": 104,
            "kv_cache": 268435456,
            "overhead": OVERHEAD_BYTES,
            "total": 104 + 268435456 + OVERHEAD_BYTES,
        },
        "created_at": made.json()["created_at"],
    }


async def test_variants_that_agree_on_the_engine_share_a_pool_and_dedicated_ones_do_not(tiny: Client) -> None:
    bodies = [
        {**BOT, "name": "a", "defaults": {"system_prompt": "Be brief."}, "scaling": {"idle_timeout_s": 5}},
        {**BOT, "name": "b"},
        {**BOT, "name": "c", "arguments": {"max_num_seqs": 8}},
        {**BOT, "name": "d", "dedicated": True},
    ]
    pools = [(await tiny.post(VARIANTS, json=body)).json()["pool"] for body in bodies]
    assert pools[0] == pools[1]
    assert len(set(pools)) == 3


async def test_the_same_name_with_other_settings_is_a_conflict(tiny: Client) -> None:
    await tiny.post(VARIANTS, json=BOT)
    response = await tiny.post(VARIANTS, json={**BOT, "scaling": {"idle_timeout_s": 5}, "dedicated": True})
    assert response.status_code == 409
    assert response.json()["detail"] == (
        "workspace acme has a variant bot with other scaling, dedicated; change it with PATCH"
    )


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "tiny"}, "name", "missing"),
    ({"name": "B o t", "model": "tiny"}, "name", "Expected `str` matching regex"),
    ({"name": "bot", "model": "gone"}, "model", "model gone does not exist"),
    ({**BOT, "adaptor": "x"}, "adaptor", "unknown field"),
    ({**BOT, "scaling": {"provisioned": -1}}, "scaling.provisioned", "Expected `int` >= 0"),
    ({**BOT, "scaling": {"provisioned": "two"}}, "scaling.provisioned", "Expected `int`, got `str`"),
    ({**BOT, "scaling": {"idle_s": 5}}, "scaling.idle_s", "unknown field"),
    ({**BOT, "defaults": {"temperature": 3}}, "defaults.temperature", "Expected `float` <= 2.0"),
    ({**BOT, "arguments": {"trust_remote_code": True}}, "arguments.trust_remote_code", "unknown field"),
    ({**BOT, "arguments": {"dtype": "int4"}}, "arguments.dtype", "Invalid enum value 'int4'"),
    (
        {**BOT, "arguments": {"max_model_len": 8192}},
        "arguments.max_model_len",
        "arguments.max_model_len: 8,192 tokens are beyond the 4,096 that model tiny allows",
    ),
    (
        {**BOT, "arguments": {"kv_cache_bytes": 1 << 20, "max_model_len": 4096, "dtype": "float32"}},
        "arguments.kv_cache_bytes",
        "arguments.kv_cache_bytes: 4,096 tokens × 512 bytes = 2,097,152, more than 1,048,576",
    ),
    (
        {**BOT, "arguments": {"kv_cache_bytes": 3_000_000_000}},
        "arguments",
        "an engine needs 3.79 GB (weights 0.00 GB + KV cache 3.00 GB + overhead 0.79 GB); the largest device, n/mem, "
        "has 3.00 GB for engines",
    ),
    (
        {**BOT, "arguments": {"max_num_seqs": 1}, "scaling": {"provisioned": 5}},
        "scaling.provisioned",
        "provisioned concurrency 5 needs 5 engines of its pool and at most 4 are allowed",
    ),
    (
        {**BOT, "arguments": {"max_num_seqs": 1}, "scaling": {"provisioned": 4}},
        "scaling.provisioned",
        "provisioned concurrency 4 can't be kept beside what others were promised: all of it needs 4 engines",
    ),
]


@pytest.mark.parametrize(("body", "field", "reason"), BAD)
async def test_a_variant_that_cannot_be_is_refused_with_field_and_reason(
    body: dict[str, Any], field: str, reason: str, tiny: Client
) -> None:
    response = await tiny.post(VARIANTS, json=body)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    (error,) = response.json()["errors"]
    assert (error["field"], error["reason"][: len(reason)]) == (field, reason)
    assert (await tiny.get(VARIANTS)).json() == {"data": [], "next": None}


async def test_a_promise_is_weighed_against_those_given_before(tiny: Client) -> None:
    own = {"arguments": {"max_num_seqs": 1}, "dedicated": True, "model": "tiny"}
    first = await tiny.post(VARIANTS, json={**own, "name": "a", "scaling": {"provisioned": 1}})
    second = await tiny.post(VARIANTS, json={**own, "name": "b", "scaling": {"provisioned": 2}, "dedicated": False})
    assert (first.status_code, second.status_code) == (201, 400)
    assert second.json()["errors"][0]["field"] == "scaling.provisioned"
    assert (await tiny.delete(f"{VARIANTS}/a")).status_code == 204
    third = await tiny.post(VARIANTS, json={**own, "name": "b", "scaling": {"provisioned": 2}, "dedicated": False})
    assert third.status_code == 201


async def test_the_fleets_devices_count_before_the_settings(tiny: Client, surroundings: Any) -> None:
    small = Device(id=DeviceId("m/gpu0"), node=NodeId("m"), memory_bytes=1_000_000_000)
    surroundings.fleet = Fleet(epoch=1, version=1, at=0.0, devices=(small,))
    response = await tiny.post(VARIANTS, json=BOT)
    assert response.status_code == 400
    assert "the largest device, m/gpu0, has 1.00 GB" in response.json()["detail"]


async def test_a_default_context_is_cut_to_a_short_model_instead_of_refused(tiny: Client, db_pool: Pool) -> None:
    await db_pool.execute("UPDATE model SET manifest = jsonb_set(manifest, '{max_model_len}', '512')")
    assert (await tiny.post(VARIANTS, json=BOT)).status_code == 201


async def test_a_patch_changes_only_what_it_names(tiny: Client, db_pool: Pool) -> None:
    settings = {"idle_timeout_s": 5, "provisioned": 1}
    before = (await tiny.post(VARIANTS, json={**BOT, "scaling": settings})).json()
    async with Listener(db_pool, CHANNEL) as heard:
        changed = await tiny.patch(f"{VARIANTS}/bot", json={"scaling": {"provisioned": 2}, "defaults": {"top_p": 0.5}})
        assert await heard.get() == "acme/bot"
    assert changed.status_code == 200
    after = {
        **before,
        "scaling": {"idle_timeout_s": 5.0, "provisioned": 2, "max_concurrency": None},
        "defaults": {"top_p": 0.5},
    }
    assert changed.json() == after == (await tiny.get(f"{VARIANTS}/bot")).json()

    reset = await tiny.patch(f"{VARIANTS}/bot", json={"scaling": {"idle_timeout_s": None}, "defaults": {"top_p": None}})
    assert reset.json()["scaling"]["idle_timeout_s"] == 600.0
    assert reset.json()["defaults"] == {}


async def test_a_patch_of_nothing_changes_nothing_and_tells_nobody(tiny: Client, db_pool: Pool) -> None:
    before = (await tiny.post(VARIANTS, json=BOT)).json()
    async with Listener(db_pool, CHANNEL) as heard:
        assert (await tiny.patch(f"{VARIANTS}/bot", json={})).json() == before
        same = await tiny.patch(f"{VARIANTS}/bot", json={"scaling": before["scaling"], "model": "tiny"})
        assert same.json() == before
        await db_pool.execute("SELECT pg_notify($1, 'end')", CHANNEL)
        assert await heard.get() == "end"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scaling": {"provisioned": -1}}, "scaling.provisioned"),
        ({"scaling": {"nonsense": 1}}, "scaling.nonsense"),
        ({"scaling": None}, "scaling"),
        ({"arguments": {"kv_cache_bytes": 5}}, "arguments.kv_cache_bytes"),
        ({"arguments": {"kv_cache_bytes": 9_000_000_000}}, "arguments"),
        ({"model": "gone"}, "model"),
        ({"name": "other"}, "name"),
    ],
)
async def test_a_bad_patch_changes_nothing(body: dict[str, Any], field: str, tiny: Client) -> None:
    before = (await tiny.post(VARIANTS, json=BOT)).json()
    response = await tiny.patch(f"{VARIANTS}/bot", json=body)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (400, field)
    assert (await tiny.get(f"{VARIANTS}/bot")).json() == before


async def test_patches_at_the_same_time_do_not_undo_each_other(tiny: Client) -> None:
    await tiny.post(VARIANTS, json=BOT)
    changes = [
        {"scaling": {"idle_timeout_s": 7}},
        {"scaling": {"max_concurrency": 3}},
        {"arguments": {"max_num_seqs": 2}},
        {"defaults": {"temperature": 0}},
    ]
    await asyncio.gather(*(tiny.patch(f"{VARIANTS}/bot", json=change) for change in changes))
    after = (await tiny.get(f"{VARIANTS}/bot")).json()
    assert after["scaling"] == {"idle_timeout_s": 7.0, "provisioned": 0, "max_concurrency": 3}
    assert (after["arguments"]["max_num_seqs"], after["defaults"]) == (2, {"temperature": 0.0})


async def test_the_same_variant_made_many_times_at_once_is_made_once(tiny: Client) -> None:
    answers = await asyncio.gather(*(tiny.post(VARIANTS, json=BOT) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]


async def test_prewarming_asks_the_controller(tiny: Client, db_pool: Pool) -> None:
    await tiny.post(VARIANTS, json=BOT)
    async with Listener(db_pool, commands.CHANNEL) as heard:
        response = await tiny.post(f"{VARIANTS}/bot/prewarm")
        assert response.status_code == 202
        assert commands.decode(await heard.get()) == commands.Prewarm("acme", "bot")
    assert (await tiny.post(f"{VARIANTS}/gone/prewarm")).status_code == 404


async def test_i7_a_variant_is_reached_only_through_its_own_workspace(tiny: Client) -> None:
    await tiny.post(VARIANTS, json=BOT)
    await tiny.post("/admin/v1/workspaces", json={"name": "other"})
    others = "/admin/v1/workspaces/other/variants"
    for method, path in (("GET", "/bot"), ("PATCH", "/bot"), ("DELETE", "/bot"), ("POST", "/bot/prewarm")):
        body: Any = {} if method == "PATCH" else None
        response = await tiny.request(method, f"{others}{path}", json=body)
        assert (response.status_code, response.json()["detail"]) == (404, "workspace other has no variant bot")
    assert (await tiny.get(others)).json()["data"] == []


async def test_variants_come_in_pages_by_name(tiny: Client) -> None:
    for name in ("c", "a", "b"):
        await tiny.post(VARIANTS, json={**BOT, "name": name})
    first = (await tiny.get(f"{VARIANTS}?limit=2")).json()
    second = (await tiny.get(f"{VARIANTS}?limit=2&after={first['next']}")).json()
    assert [variant["name"] for variant in first["data"] + second["data"]] == ["a", "b", "c"]


async def test_no_variant_is_made_while_no_device_is_known(parts: AdminParts, tiny: Client) -> None:
    app = Litestar([admin_routes(msgspec.structs.replace(parts, expected_devices=()))])
    async with Client(transport=ASGITransport(app), base_url="http://greenroom", headers=tiny.headers) as client:  # type: ignore[arg-type]
        response = await client.post(VARIANTS, json=BOT)
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["detail"] == "it isn't known yet which devices there are; is the controller running?"
