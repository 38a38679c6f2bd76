from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
from httpx import AsyncClient as Client

Pool: TypeAlias = "asyncpg.Pool[Any]"
USAGE = "/admin/v1/usage"
DAY = datetime(2026, 11, 10, tzinfo=UTC)


async def event(pool: Pool, at: datetime, workspace: str = "acme", variant: str = "bot", **over: Any) -> None:
    """One final usage event of 10 prompt and 5 completion tokens."""
    fields: dict[str, Any] = {
        "request_id": uuid4(),
        "attempt": 1,
        "final": True,
        "workspace": workspace,
        "key": "k1",
        "variant": variant,
        "model": "tiny",
        "endpoint": "chat",
        "stream": True,
        "outcome": "completed",
        "source": "stream",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "cold": False,
        "received_at": at,
        "ended_at": at,
        "queued_us": 0,
        "held_us": 0,
        "duration_us": 0,
        "trace_id": "",
        **over,
    }
    places = ", ".join(f"${number}" for number in range(1, len(fields) + 1))
    await pool.execute(f"INSERT INTO usage_event ({', '.join(fields)}) VALUES ({places})", *fields.values())


def row(**over: Any) -> dict[str, Any]:
    return {
        "requests": 1,
        "completed": 1,
        "cold": 0,
        "failed_attempts": 0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        **over,
    }


@pytest.fixture
async def events(db_pool: Pool, surroundings: Any) -> None:
    surroundings.now = (DAY + timedelta(days=5)).timestamp()
    await event(db_pool, DAY + timedelta(hours=1), cold=True)
    await event(db_pool, DAY + timedelta(hours=2), outcome="client_gone", key="k2")
    await event(db_pool, DAY + timedelta(hours=25))
    await event(db_pool, DAY, workspace="other", variant="helper")
    await event(db_pool, DAY - timedelta(days=30))
    await event(db_pool, DAY + timedelta(days=6))


async def test_usage_is_by_workspace_variant_and_day_of_this_month(admin: Client, events: None) -> None:
    assert (await admin.get(USAGE)).json() == {
        "from": "2026-11-01T00:00:00Z",
        "to": "2026-11-15T00:00:00Z",
        "by": ["workspace", "variant", "day"],
        "data": [
            row(
                start="2026-11-10T00:00:00Z",
                workspace="acme",
                variant="bot",
                requests=2,
                cold=1,
                prompt_tokens=20,
                cached_tokens=8,
                completion_tokens=10,
            )
            | {"completed": 1},
            row(start="2026-11-10T00:00:00Z", workspace="other", variant="helper"),
            row(start="2026-11-11T00:00:00Z", workspace="acme", variant="bot"),
        ],
        "next": None,
    }


async def test_usage_can_be_split_and_narrowed_otherwise(admin: Client, events: None) -> None:
    by_key = (await admin.get(f"{USAGE}?by=key&workspace=acme")).json()["data"]
    assert [(entry["key"], entry["requests"]) for entry in by_key] == [("k1", 2), ("k2", 1)]
    assert "workspace" not in by_key[0]
    by_hour = (await admin.get(f"{USAGE}?by=hour&workspace=acme&variant=bot&key=k1")).json()["data"]
    assert [entry["start"] for entry in by_hour] == ["2026-11-10T01:00:00Z", "2026-11-11T01:00:00Z"]
    everything = (await admin.get(f"{USAGE}?by=&from=2026-01-01&to=2026-12-01T00:00:00%2B01:00")).json()["data"]
    assert everything == [
        row(requests=6, completed=5, cold=1, prompt_tokens=60, cached_tokens=24, completion_tokens=30)
    ]


async def test_usage_comes_in_pages(admin: Client, events: None) -> None:
    first = (await admin.get(f"{USAGE}?limit=2")).json()
    second = (await admin.get(f"{USAGE}?limit=2&after={first['next']}")).json()
    assert first["data"] + second["data"] == (await admin.get(USAGE)).json()["data"]
    assert second["next"] is None


@pytest.mark.parametrize(
    ("query", "accept"), [("?format=csv", "*/*"), ("", "text/csv"), ("", "text/csv, application/json;q=0.5")]
)
async def test_usage_comes_as_csv(query: str, accept: str, admin: Client, events: None) -> None:
    response = await admin.get(f"{USAGE}{query}", headers={"Accept": accept})
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    lines = list(csv.DictReader(io.StringIO(response.text)))
    assert [(line["start"], line["workspace"], line["variant"], line["prompt_tokens"]) for line in lines] == [
        ("2026-11-10T00:00:00Z", "acme", "bot", "20"),
        ("2026-11-10T00:00:00Z", "other", "helper", "10"),
        ("2026-11-11T00:00:00Z", "acme", "bot", "10"),
    ]


async def test_json_is_what_comes_without_a_wish_and_when_format_says_so(admin: Client, events: None) -> None:
    for query, accept in (("", "*/*"), ("", "application/json"), ("?format=json", "text/csv")):
        response = await admin.get(f"{USAGE}{query}", headers={"Accept": accept})
        assert response.headers["content-type"] == "application/json"


async def test_csv_has_all_pages(admin: Client, db_pool: Pool, surroundings: Any) -> None:
    surroundings.now = (DAY + timedelta(days=5)).timestamp()
    await db_pool.execute(
        """
        INSERT INTO usage_event (request_id, attempt, final, workspace, key, variant, model, endpoint, stream, outcome,
            source, prompt_tokens, cached_tokens, completion_tokens, cold, received_at, ended_at, queued_us, held_us,
            duration_us, trace_id)
        SELECT gen_random_uuid(), 1, true, 'w' || n, 'k', 'bot', 'tiny', 'chat', true, 'completed', 'stream', 1, 0, 1,
               false, $1, $1, 0, 0, 0, '' FROM generate_series(1, 2001) n
        """,
        DAY,
    )
    response = await admin.get(f"{USAGE}?by=workspace&format=csv")
    assert len(response.text.splitlines()) == 2002
    assert len(set(response.text.splitlines())) == 2002


async def test_nothing_used_is_an_empty_list_and_a_csv_with_a_heading(admin: Client) -> None:
    assert (await admin.get(USAGE)).json()["data"] == []
    assert (await admin.get(f"{USAGE}?format=csv&by=variant")).text == (
        "variant,requests,completed,cold,failed_attempts,prompt_tokens,cached_tokens,completion_tokens\r\n"
    )


@pytest.mark.parametrize(
    ("query", "field", "reason"),
    [
        ("by=model", "by", "'model' is none of workspace, variant, key, hour, day"),
        ("by=hour,day", "by", "hour or day, not both"),
        ("from=yesterday", "from", "'yesterday' is neither a date like 2026-11-01 nor an RFC 3339 time"),
        ("from=2026-02-01&to=2026-01-01", "to", "is before `from`"),
        ("format=xml", "format", "Invalid enum value 'xml'"),
        ("workspce=acme", "workspce", "unknown parameter"),
        ("after=eA", "after", "not a cursor of this API"),
    ],
)
async def test_a_bad_question_is_refused_with_the_parameter_named(
    query: str, field: str, reason: str, admin: Client
) -> None:
    response = await admin.get(f"{USAGE}?{query}")
    assert response.status_code == 400
    (error,) = response.json()["errors"]
    assert (error["field"], error["reason"][: len(reason)]) == (field, reason)
