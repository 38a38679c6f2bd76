"""Sums of usage: what is counted, how it is split, who sees what."""

from __future__ import annotations

from typing import Any

import pytest
from metering import NOW, Pool, closed, opened

from tenants import queries
from tenants.queries import Closing
from tenants.usage import Outcome, Source, Tokens, UsageGroup, UsageOpen, UsageSum

HOUR, DAY = 3600.0, 86_400.0
EVER: dict[str, Any] = {"since": 0.0, "until": 2 * NOW}


async def settle(pool: Pool, row: UsageOpen, **fields: Any) -> None:
    await queries.all_usage_close(pool, [Closing(row, closed(row, **fields))])


def total(group: UsageGroup, requests: int, tokens: Tokens, **fields: int) -> UsageSum:
    counts = {"completed": requests, "cold": 0, "failed_attempts": 0} | fields
    return UsageSum(
        group=group,
        requests=requests,
        prompt_tokens=tokens.prompt,
        cached_tokens=tokens.cached,
        completion_tokens=tokens.completion,
        **counts,
    )


async def test_a_sum_counts_requests_and_the_tokens_of_their_final_attempts(db_pool: Pool) -> None:
    await settle(db_pool, opened(), tokens=Tokens(10, 4, 5), cold=True)
    await settle(db_pool, opened(), tokens=Tokens(1, 0, 2), outcome=Outcome.CLIENT_GONE)
    row = opened()
    await settle(db_pool, row, tokens=Tokens(100, 0, 100), final=False, outcome=Outcome.ENGINE_FAILED)
    await settle(db_pool, opened(request_id=row.request_id, attempt=2), tokens=Tokens(3, 3, 3))
    sums = await queries.sum_usage(db_pool, "acme", **EVER)
    assert sums == (total(UsageGroup(), 3, Tokens(14, 7, 10), completed=2, cold=1, failed_attempts=1),)


async def test_of_each_attempt_only_the_highest_revision_counts(db_pool: Pool) -> None:
    row = opened()
    await settle(db_pool, row, outcome=Outcome.GATEWAY_LOST, source=Source.BOOK, tokens=Tokens(10, 4, 3))
    await settle(db_pool, row, tokens=Tokens(10, 4, 5))
    sums = await queries.sum_usage(db_pool, "acme", **EVER)
    assert sums == (total(UsageGroup(), 1, Tokens(10, 4, 5)),)


async def test_nothing_used_has_no_sums(db_pool: Pool) -> None:
    assert await queries.sum_usage(db_pool, "acme", **EVER, by=["variant"]) == ()


async def test_i7_a_workspaces_sums_hold_nothing_of_another(db_pool: Pool) -> None:
    for workspace, prompt in [("acme", 1), ("globex", 10), ("globex", 100)]:
        await settle(db_pool, opened(workspace=workspace), tokens=Tokens(prompt, 0, 0))
    mine = await queries.sum_usage(db_pool, "acme", **EVER, by=["workspace", "variant", "key"])
    assert mine == (total(UsageGroup(workspace="acme", variant="bot", key="k1"), 1, Tokens(prompt=1)),)
    behind = UsageGroup(workspace="acme", variant="bot", key="k1")
    assert await queries.sum_usage(db_pool, "acme", **EVER, by=["workspace", "variant", "key"], after=behind) == ()
    assert await queries.sum_usage(db_pool, "initech", **EVER, by=["key"]) == ()
    everybody = await queries.all_usage_sums(db_pool, **EVER, by=["workspace"])
    assert [(s.group.workspace, s.prompt_tokens) for s in everybody] == [("acme", 1), ("globex", 110)]
    one = await queries.all_usage_sums(db_pool, **EVER, by=["workspace"], workspace="globex")
    assert [(s.group.workspace, s.prompt_tokens) for s in one] == [("globex", 110)]


async def test_sums_are_split_by_what_is_asked_for(db_pool: Pool) -> None:
    for variant, key, prompt in [("bot", "k1", 1), ("bot", "k2", 2), ("cat", "k1", 4)]:
        await settle(db_pool, opened(variant=variant, key=key), tokens=Tokens(prompt, 0, 0))
    for by, expected in [
        (["variant"], [("bot", "", 3), ("cat", "", 4)]),
        (["key"], [("", "k1", 5), ("", "k2", 2)]),
        (["key", "variant"], [("bot", "k1", 1), ("bot", "k2", 2), ("cat", "k1", 4)]),
    ]:
        sums = await queries.sum_usage(db_pool, "acme", **EVER, by=by)
        assert [(s.group.variant, s.group.key, s.prompt_tokens) for s in sums] == expected
    for chosen, prompt in [({"variant": "bot"}, 3), ({"key": "k1"}, 5), ({"variant": "bot", "key": "k1"}, 1)]:
        [chosen_sum] = await queries.sum_usage(db_pool, "acme", **EVER, **chosen)
        assert chosen_sum.prompt_tokens == prompt


async def test_hours_and_days_begin_in_utc_and_count_by_receipt(db_pool: Pool) -> None:
    for hours, prompt in [(0.0, 1), (0.99, 2), (1.0, 4), (23.99, 8), (24.0, 16)]:
        row = opened(received_at=NOW + hours * HOUR)
        await settle(db_pool, row, tokens=Tokens(prompt, 0, 0), ended_at=NOW + 5 * DAY)
    async with db_pool.acquire() as connection:
        await connection.execute("SET TIME ZONE 'Asia/Kolkata'")
        by_hour = await queries.sum_usage(connection, "acme", **EVER, by=["hour"])
        by_day = await queries.sum_usage(connection, "acme", **EVER, by=["day"])
    assert [((s.group.start - NOW) / HOUR, s.prompt_tokens) for s in by_hour] == [(0, 3), (1, 4), (23, 8), (24, 16)]
    assert [((s.group.start - NOW) / DAY, s.prompt_tokens) for s in by_day] == [(0, 15), (1, 16)]
    with pytest.raises(ValueError, match="by hour or by day"):
        await queries.sum_usage(db_pool, "acme", **EVER, by=["hour", "day"])


async def test_a_range_has_its_beginning_and_not_its_end(db_pool: Pool) -> None:
    for second in (0, 1, 2):
        await settle(db_pool, opened(received_at=NOW + second), tokens=Tokens(10**second, 0, 0))
    [middle] = await queries.sum_usage(db_pool, "acme", since=NOW + 1, until=NOW + 2)
    assert middle.prompt_tokens == 10


@pytest.mark.parametrize("by", [["day", "variant", "key"], ["variant", "key"], ["hour", "workspace"], ["key"]])
async def test_pages_give_each_group_once_and_in_order(db_pool: Pool, by: list[queries.Split]) -> None:
    for number in range(24):
        row = opened(
            received_at=NOW + number % 3 * 11 * HOUR,
            variant=f"v{number % 4}",
            key=f"k{number % 2}",
            workspace="Zed" if number % 5 else "acme",
        )
        await settle(db_pool, row, tokens=Tokens(number, 0, 0))
    whole = await queries.all_usage_sums(db_pool, **EVER, by=by)
    paged: list[UsageSum] = []
    while page := await queries.all_usage_sums(
        db_pool, **EVER, by=by, limit=2, after=paged[-1].group if paged else None
    ):
        assert len(page) <= 2
        paged += page
    assert tuple(paged) == whole
    assert sum(s.prompt_tokens for s in whole) == sum(range(24))
    assert [s.group for s in whole] == sorted(s.group for s in whole)


async def test_sums_beyond_32_bits_are_whole(db_pool: Pool) -> None:
    for _ in range(3):
        await settle(db_pool, opened(), tokens=Tokens(2**40, 2**39, 2**40 + 1))
    [everything] = await queries.sum_usage(db_pool, "acme", **EVER)
    assert everything.completion_tokens == 3 * (2**40 + 1)
