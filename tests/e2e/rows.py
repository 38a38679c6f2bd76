"""The ledger's rows, the engine books and the gateways' log, read behind the product's back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import asyncpg

from loadtests.bench.stack import Stack


def query(stack: Stack, sql: str, *arguments: Any) -> list[dict[str, Any]]:
    """Rows of the stack's database."""

    async def fetch() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(f"postgresql://postgres:@/greenroom?host={stack.run_dir}/pg")
        try:
            return [dict(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


def settled(stack: Stack, timeout_s: float = 60.0) -> None:
    """Return once no request is open in the ledger."""
    stack.wait_until(lambda: not query(stack, "SELECT 1 FROM usage_open"), "every open row to be closed", timeout_s)


def finals(stack: Stack) -> dict[str, dict[str, Any]]:
    """The final usage event of every request, by id."""
    rows = query(stack, "SELECT * FROM usage_event WHERE final AND revision = 0")
    assert len({row["request_id"] for row in rows}) == len(rows), "a request has two final events"
    return {str(row["request_id"]): row for row in rows}


def books(stack: Stack) -> dict[str, dict[str, int]]:
    """What all engine books say, summed by request id (attempts apart, as `id.2`)."""
    sums: dict[str, dict[str, int]] = {}
    for entry in _entries(stack):
        total = sums.setdefault(entry["request_id"], {"prompt": 0, "cached": 0, "completion": 0, "lines": 0})
        for name in ("prompt", "cached", "completion"):
            total[name] += entry[name]
        total["lines"] += 1
    return sums


def reasons(stack: Stack) -> dict[str, list[str]]:
    """Why the sequences of each request ended, by all engine books."""
    found: dict[str, list[str]] = {}
    for entry in _entries(stack):
        found.setdefault(entry["request_id"], []).append(entry["reason"])
    return found


def _entries(stack: Stack) -> Iterator[dict[str, Any]]:
    """The lines of all engine books."""
    for path in (stack.data_dir / "engines").glob("*/book.jsonl"):
        yield from map(json.loads, path.read_text().splitlines())


def refused(stack: Stack) -> set[str]:
    """The requests that were never accepted because they couldn't be recorded, by the gateways' log."""
    entries = re.findall(r'\{[^{}]*"event": "refused"[^{}]*\}', stack.log_path.read_text())
    # A request that is refused before it is to be recorded has a code there in place of a detail.
    return {entry["request_id"] for entry in map(json.loads, entries) if "detail" in entry}


def latest(stack: Stack) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Events by their highest revision: the final one of each request, and all by their name in the engine books."""
    rows = query(stack, "SELECT DISTINCT ON (request_id, attempt) * FROM usage_event ORDER BY 1, 2, revision DESC")
    final = [row for row in rows if row["final"]]
    ended = {str(row["request_id"]): row for row in final}
    assert len(ended) == len(final), "a request has two final attempts"
    return ended, {
        str(row["request_id"]) if row["attempt"] == 1 else f"{row['request_id']}.{row['attempt']}": row for row in rows
    }
