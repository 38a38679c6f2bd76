from __future__ import annotations

from typing import Any, TypeAlias

import asyncpg
import pytest
from httpx import AsyncClient as Client
from litestar import Litestar

from app.admin.parts import AdminParts
from app.admin.problems import MEDIA_TYPE
from engines.catalog import CHANNEL
from tenants.errors import KeyRefused
from tenants.queries import KEYS_CHANNEL

Pool: TypeAlias = "asyncpg.Pool[Any]"

ROUTES = [
    ("GET", "/workspaces"),
    ("POST", "/workspaces"),
    ("GET", "/workspaces/acme"),
    ("POST", "/workspaces/acme/disable"),
    ("POST", "/workspaces/acme/keys"),
    ("GET", "/workspaces/acme/keys"),
    ("DELETE", "/workspaces/acme/keys/aaaaaaaaaaaa"),
    ("GET", "/models"),
    ("POST", "/models"),
    ("GET", "/models/tiny"),
    ("DELETE", "/models/tiny"),
    ("GET", "/workspaces/acme/variants"),
    ("POST", "/workspaces/acme/variants"),
    ("GET", "/workspaces/acme/variants/bot"),
    ("PATCH", "/workspaces/acme/variants/bot"),
    ("DELETE", "/workspaces/acme/variants/bot"),
    ("POST", "/workspaces/acme/variants/bot/prewarm"),
    ("GET", "/engines"),
    ("GET", "/engines/00000000-0000-7000-8000-000000000000"),
    ("POST", "/engines/00000000-0000-7000-8000-000000000000/stop"),
    ("GET", "/engines/00000000-0000-7000-8000-000000000000/logs"),
    ("GET", "/fleet"),
    ("GET", "/usage"),
]


def test_every_route_is_in_the_table_above(app: Litestar) -> None:
    found = {
        (method, route.path.removeprefix("/admin/v1"))
        for route in app.routes
        if route.path.startswith("/admin/v1")
        for method in getattr(route, "methods", ())
        if method != "OPTIONS"
    }
    assert len(found) == len(ROUTES)


async def test_i7_no_route_opens_without_a_key_or_with_a_workspaces(acme: Client) -> None:
    key = (await acme.post("/admin/v1/workspaces/acme/keys", json={})).json()["key"]
    for method, path in ROUTES:
        for authorization, status in (("", 401), ("Bearer nonsense", 401), (f"Bearer {key}", 403)):
            response = await acme.request(method, f"/admin/v1{path}", headers={"Authorization": authorization})
            assert (method, path, response.status_code) == (method, path, status)
            assert response.headers["content-type"] == MEDIA_TYPE
            assert key not in response.text


async def test_the_answer_to_a_missing_key_says_what_to_send(anonymous: Client) -> None:
    response = await anonymous.get("/admin/v1/workspaces")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "no API key: send `Authorization: Bearer <key>`",
    }


async def test_a_workspace_is_made_once_and_making_it_again_changes_nothing(admin: Client) -> None:
    made = await admin.post("/admin/v1/workspaces", json={"name": "acme"})
    again = await admin.post("/admin/v1/workspaces", json={"name": "acme"})
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json() == again.json()
    assert made.json()["name"] == "acme"
    assert made.json()["disabled_at"] is None
    assert (await admin.get("/admin/v1/workspaces/acme")).json() == made.json()


async def test_workspaces_come_in_pages(admin: Client) -> None:
    for name in ("c", "a", "b"):
        await admin.post("/admin/v1/workspaces", json={"name": name})
    first = (await admin.get("/admin/v1/workspaces?limit=2")).json()
    assert [workspace["name"] for workspace in first["data"]] == ["a", "b"]
    second = (await admin.get(f"/admin/v1/workspaces?limit=2&after={first['next']}")).json()
    assert [workspace["name"] for workspace in second["data"]] == ["c"]
    assert second["next"] is None


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"name": "Acme"}, "name: Expected `str` matching regex"),
        ({"name": 7}, "name: Expected `str`, got `int`"),
        ({}, "name: missing"),
        ({"name": "a", "plan": "gold"}, "plan: unknown field"),
        (["a"], "Expected `object`, got `array`"),
        (None, "a JSON body is needed"),
    ],
)
async def test_a_bad_body_is_refused_with_the_field_named(body: Any, detail: str, admin: Client) -> None:
    response = await admin.post("/admin/v1/workspaces", json=body)
    assert response.status_code == 400
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (b'{"name"', 400, "the body is not JSON"),
        (b"", 400, "a JSON body is needed"),
        (b'{"name":"\xff"}', 400, "the request has text that is not UTF-8"),
        (b"[" * 5000, 400, "the request has text that is not UTF-8, a null character, or JSON nested too deeply"),
        (b'{"name":"' + b"a" * (1 << 20) + b'"}', 413, "Request Entity Too Large"),
    ],
)
async def test_a_body_that_is_no_json_is_refused(content: bytes, status: int, detail: str, admin: Client) -> None:
    response = await admin.post("/admin/v1/workspaces", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit: Expected `int` >= 1"),
        ("limit=501", "limit: Expected `int` <= 500"),
        ("limit=x", "limit: Expected `int`, got `str`"),
        ("after=%21", "after: not a cursor of this API"),
        ("after=_w", "after: not a cursor of this API"),
    ],
)
async def test_a_bad_query_is_refused_with_the_parameter_named(query: str, detail: str, admin: Client) -> None:
    response = await admin.get(f"/admin/v1/workspaces?{query}")
    assert response.status_code == 400
    assert response.json()["detail"] == detail
    assert response.json()["errors"] == [dict(zip(("field", "reason"), detail.split(": ", 1), strict=True))]


async def test_a_workspace_that_is_not_there_is_404(admin: Client) -> None:
    for method, path in (
        ("GET", "/workspaces/gone"),
        ("POST", "/workspaces/gone/disable"),
        ("GET", "/workspaces/gone/keys"),
        ("GET", "/workspaces/gone/variants"),
        ("GET", "/workspaces/gone/variants/bot"),
    ):
        response = await admin.request(method, f"/admin/v1{path}")
        assert (response.status_code, response.json()["detail"]) == (404, "there is no workspace gone")
    response = await admin.post("/admin/v1/workspaces/gone/keys", json={})
    assert response.status_code == 404


async def test_a_null_character_in_a_path_is_400_and_no_fault_of_the_database(admin: Client) -> None:
    assert (await admin.get("/admin/v1/workspaces/a%00b")).status_code == 400


async def test_a_disabled_workspace_is_announced_and_its_keys_open_nothing(
    acme: Client, db_pool: Pool, parts: AdminParts
) -> None:
    key = (await acme.post("/admin/v1/workspaces/acme/keys", json={})).json()
    assert (await parts.authenticator.authenticate(f"Bearer {key['key']}", now=0)).workspace == "acme"
    heard: list[tuple[str, str]] = []
    async with db_pool.acquire() as connection:
        listener: Any = lambda _connection, _pid, channel, payload: heard.append((channel, payload))  # noqa: E731
        for channel in (KEYS_CHANNEL, CHANNEL):
            await connection.add_listener(channel, listener)
        disabled = await acme.post("/admin/v1/workspaces/acme/disable")
        await connection.execute("SELECT 1")
        for channel in (KEYS_CHANNEL, CHANNEL):
            await connection.remove_listener(channel, listener)
    assert disabled.status_code == 200
    assert disabled.json()["disabled_at"] is not None
    assert heard == [(KEYS_CHANNEL, key["id"]), (CHANNEL, "")]

    parts.authenticator.invalidate(key["id"])
    with pytest.raises(KeyRefused, match="workspace acme is disabled"):
        await parts.authenticator.authenticate(f"Bearer {key['key']}", now=0)
    again = await acme.post("/admin/v1/workspaces/acme/disable")
    assert again.json() == disabled.json()


async def test_while_postgres_is_away_the_answer_is_503(acme: Client, db_pool: Pool) -> None:
    await db_pool.close()
    response = await acme.get("/admin/v1/workspaces")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert "database" in response.json()["detail"]
