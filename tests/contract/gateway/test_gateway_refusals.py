"""What bad input gets: OpenAI's error shape that names the field, never a 5xx, never another workspace's names."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateways import Gateway, Start

from tenants import queries
from tenants.keys import KeyKind, digest, generate

CHAT = "/v1/chat/completions"
GOOD = json.dumps({"model": "bot", "messages": [{"role": "user", "content": "hi"}]})


async def ask(
    gateway: Gateway, data: bytes | str = GOOD, *, method: str = "POST", path: str = CHAT, **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """The status, the error and the headers of a request that is refused."""
    sent = {
        "Content-Type": "application/json",
        **gateway.auth(),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    async with gateway.session.request(method, gateway.url + path, data=data, headers=sent) as answer:
        body = json.loads(await answer.read())
        assert answer.content_type == "application/json"
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
        assert answer.headers["x-request-id"]
        return answer.status, body["error"], {name.lower(): value for name, value in answer.headers.items()}


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Basic x", "Bearer nonsense", "Bearer gr-aaaaaaaaaaaa-" + "b" * 52, "Bearer \xff"]
)
async def test_a_key_that_is_none_is_401(gateway: Gateway, authorization: str) -> None:
    status, error, headers = await ask(gateway, Authorization=authorization)
    assert (status, error["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert "b" * 20 not in error["message"]


async def test_an_operators_key_opens_no_workspace(gateway: Gateway) -> None:
    key = generate(KeyKind.OPERATOR, b"x" * 40)
    await queries.create_key(gateway.pool, None, key.id, digest(b"p" * 32, key))
    status, error, _ = await ask(gateway, Authorization=f"Bearer {key.text}")
    assert (status, error["code"]) == (403, "key_not_allowed")


async def test_a_revoked_key_is_refused_once_its_notification_has_come(gateway: Gateway) -> None:
    async with gateway.session.get(f"{gateway.url}/v1/models", headers=gateway.auth()) as answer:
        assert answer.status == 200
    key_id = gateway.key.split("-")[1]
    await queries.revoke_key(gateway.pool, "acme", key_id)
    gateway.parts.authenticator.invalidate(key_id)
    status, error, _ = await ask(gateway)
    assert (status, error["code"]) == (401, "invalid_api_key")


async def test_i7_an_unknown_model_names_the_workspaces_own_variants_only(gateway: Gateway) -> None:
    body = GOOD.replace("bot", "secret")
    status, error, _ = await ask(gateway, body)
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "bot, narrow, polite" in error["message"]
    _, error, _ = await ask(gateway, GOOD, Authorization=f"Bearer {gateway.other_key}")
    assert error["message"].endswith("it has: secret")


async def test_i7_models_are_a_workspaces_own(gateway: Gateway) -> None:
    async def names(key: str) -> list[str]:
        async with gateway.session.get(f"{gateway.url}/v1/models", headers=gateway.auth(key)) as answer:
            assert answer.headers["x-request-id"]
            return [model["id"] for model in (await answer.json())["data"]]

    assert await names(gateway.key) == ["bot", "narrow", "polite"]
    assert await names(gateway.other_key) == ["secret"]
    status, error, _ = await ask(gateway, b"", method="GET", path="/v1/models/secret")
    assert (status, error["code"]) == (404, "model_not_found")


async def test_models_say_what_to_expect(gateway: Gateway) -> None:
    url = f"{gateway.url}/v1/models/bot"
    async with gateway.session.get(url, headers=gateway.auth()) as answer:
        cold = await answer.json()
    assert (cold["id"], cold["object"], cold["owned_by"], cold["status"]) == ("bot", "model", "acme", "cold")
    assert cold["eta_seconds"] > 0
    await gateway.engine()
    async with gateway.session.get(url, headers=gateway.auth()) as answer:
        ready = await answer.json()
    assert (ready["status"], ready["eta_seconds"]) == ("ready", 0.0)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"a":' + b"[" * 50_000, None),
        (b'{"model":"bot"}', "messages"),
        (b'{"model":1,"messages":[]}', "model"),
        (GOOD.replace("}]}", '}],"temperature":"x"}').encode(), "temperature"),
        (GOOD.replace("}]}", '}],"n":99}').encode(), "n"),
        (GOOD.replace("}]}", '}],"kv_transfer_params":{"x":1}}').encode(), "kv_transfer_params"),
        (b'{"model":"bot","model":"bot","messages":[{"role":"user","content":"x"}]}', "model"),
    ],
)
async def test_a_body_that_can_not_be_is_a_400_that_names_the_field(
    gateway: Gateway, data: bytes, param: str | None
) -> None:
    status, error, _ = await ask(gateway, data)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")


async def test_what_is_not_accepted_is_not_in_the_ledger(gateway: Gateway) -> None:
    await ask(gateway, b"{")
    await ask(gateway, GOOD.replace("bot", "nobody"))
    assert await gateway.pool.fetchval("SELECT count(*) FROM usage_open") == 0
    assert await gateway.pool.fetchval("SELECT count(*) FROM usage_event") == 0
    async with gateway.session.get(f"{gateway.operators}/metrics") as answer:
        text = await answer.text()
    assert 'greenroom_refused_total{status="404"} 1.0' in text


async def test_a_body_over_the_limit_is_413_whether_its_length_is_told_or_not(start: Start) -> None:
    gateway = await start(max_body_bytes=1024)
    status, error, _ = await ask(gateway, b'{"a":"' + b"x" * 2000 + b'"}')
    assert (status, error["code"]) == (413, "request_too_large")

    async def parts() -> Any:
        for _ in range(20):
            yield b"x" * 100

    status, error, _ = await ask(gateway, parts())  # type: ignore[arg-type]
    assert (status, error["code"]) == (413, "request_too_large")


async def test_a_body_that_does_not_come_is_given_up(start: Start) -> None:
    gateway = await start(body_timeout_s=0.1)
    answer = await raw(
        gateway,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {gateway.key}\r\nConnection: close\r\n\r\n".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


@pytest.mark.parametrize("headers", [{"Content_Type": "text/plain"}, {"Content_Encoding": "gzip"}])
async def test_only_plain_json_is_taken(gateway: Gateway, headers: dict[str, str]) -> None:
    status, error, _ = await ask(gateway, **headers)
    assert (status, error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/admin/v1/workspaces", 404, "unknown_url"),
        ("GET", "/metrics", 404, "unknown_url"),
        ("GET", "/v1/models/a/b", 404, "unknown_url"),
    ],
)
async def test_a_route_that_is_not_there_is_refused_in_the_same_shape(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    got, error, headers = await ask(gateway, b"", method=method, path=path)
    assert (got, error["code"]) == (status, code)
    if status == 405:
        assert headers["allow"]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_the_same_shape(gateway: Gateway, data: bytes) -> None:
    answer = await raw(gateway, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 401 " not in head.split(b"\r\n")[0]:
        assert head.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message":' in body


async def test_i11_an_engines_health_and_ready_pages_say_nothing_of_tenants(gateway: Gateway) -> None:
    for path, text in (("/livez", "ok"), ("/readyz", "no fleet yet")):
        async with gateway.session.get(gateway.url + path) as answer:
            assert await answer.text() == text
    gateway.publish()
    async with gateway.session.get(f"{gateway.operators}/readyz") as answer:
        assert (answer.status, await answer.text()) == (200, "ok")


async def test_a_ledger_that_is_away_refuses_before_the_first_byte_and_aborts_the_engine(gateway: Gateway) -> None:
    engine = await gateway.engine(tokens=3)
    await gateway.events()
    lock = await gateway.pool.acquire()
    transaction = lock.transaction()
    await transaction.start()
    await lock.execute("LOCK TABLE usage_open IN ACCESS EXCLUSIVE MODE")
    async with gateway.post(stream=True) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "ledger_unavailable"
        assert answer.headers["x-should-retry"] == "true"
    await transaction.rollback()
    await gateway.pool.release(lock)
    assert len(await engine.asked()) == 2
    assert gateway.parts.admission.running() == 0
    (row,) = await gateway.ended()
    assert row["outcome"] == "completed"


async def raw(gateway: Gateway, data: bytes) -> bytes:
    """Whatever comes back for these bytes until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer
