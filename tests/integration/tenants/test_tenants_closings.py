"""The closing statement by itself: said again, late, or against what others said."""

from __future__ import annotations

import pytest
from metering import TOKENS, Pool, closed, event, opened, tables
from msgspec.structs import replace

from tenants import queries
from tenants.queries import Closing
from tenants.usage import Outcome, Source, Tokens, UsageClose, UsageOpen

LOST = {"outcome": Outcome.GATEWAY_LOST, "source": Source.BOOK}


async def say(pool: Pool, row: UsageOpen, close: UsageClose) -> bool:
    """Is it settled?"""
    return await queries.all_usage_close(pool, [Closing(row, close)]) == {(row.request_id, row.attempt)}


async def test_i1_a_closing_said_again_after_its_commit_changes_nothing(db_pool: Pool) -> None:
    row = opened()
    await queries.all_usage_open(db_pool, [row])
    for close in (closed(row), closed(row), closed(row, outcome=Outcome.DRAINED), closed(row, **LOST)):
        assert await say(db_pool, row, close)
    assert (await tables(db_pool)).events == {row.request_id: [event()]}


async def test_i1_a_correction_said_again_changes_nothing(db_pool: Pool) -> None:
    row = opened()
    for close in (closed(row, **LOST), closed(row), closed(row), closed(row, **LOST), closed(row, **LOST)):
        assert await say(db_pool, row, close)
    lost = event(Outcome.GATEWAY_LOST, Source.BOOK)
    assert (await tables(db_pool)).events == {row.request_id: [lost, event(revision=1)]}


async def test_i1_a_failed_attempt_said_again_does_not_open_the_next_one_again(db_pool: Pool) -> None:
    row = opened()
    again = replace(row, attempt=2)
    failed = closed(row, final=False, outcome=Outcome.ENGINE_FAILED)
    assert await say(db_pool, row, failed)
    assert await say(db_pool, again, closed(again))
    assert await say(db_pool, row, failed)
    after = await tables(db_pool)
    after.check_i1()
    assert after.opens == {}


async def test_i1_a_request_that_has_ended_does_not_end_again_with_another_attempt(db_pool: Pool) -> None:
    row = opened()
    again = replace(row, attempt=2)
    assert await say(db_pool, row, closed(row))
    await queries.all_usage_open(db_pool, [again])
    assert await say(db_pool, again, closed(again))
    after = await tables(db_pool)
    assert (after.events, after.opens) == ({row.request_id: [event()]}, {})


async def test_a_closing_needs_no_open_row(db_pool: Pool) -> None:
    row = opened()
    assert await say(db_pool, row, closed(row))
    assert (await tables(db_pool)).events == {row.request_id: [event()]}


@pytest.mark.parametrize(
    ("source", "tokens", "kept"),
    [
        (Source.STREAM, Tokens(1, 0, 1), event(tokens=Tokens(1, 0, 1), revision=1)),
        (Source.NONE, Tokens(), event(source=Source.BOOK, revision=1)),
        (Source.STREAM, Tokens(), event(tokens=Tokens(), revision=1)),
    ],
)
async def test_numbers_are_superseded_by_numbers_and_never_by_none(
    db_pool: Pool, source: Source, tokens: Tokens, kept: object
) -> None:
    row = opened()
    assert await say(db_pool, row, closed(row, **LOST))
    assert await say(db_pool, row, closed(row, source=source, tokens=tokens))
    assert (await tables(db_pool)).last(row.request_id) == [kept]


async def test_many_closings_are_settled_each_by_itself(db_pool: Pool) -> None:
    new, known, lost = (opened() for _ in range(3))
    assert await say(db_pool, known, closed(known, tokens=Tokens()))
    assert await say(db_pool, lost, closed(lost, **LOST))
    settled = await queries.all_usage_close(db_pool, [Closing(row, closed(row)) for row in (new, known, lost)])
    assert settled == {(row.request_id, 1) for row in (new, known, lost)}
    last = {request: events[-1] for request, events in (await tables(db_pool)).events.items()}
    assert last == {
        new.request_id: event(tokens=TOKENS),
        known.request_id: event(tokens=Tokens()),
        lost.request_id: event(tokens=TOKENS, revision=1),
    }
