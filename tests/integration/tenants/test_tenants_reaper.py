"""The reaper against a real Postgres, alone, beside another one, and beside the gateway whose rows it closes."""

from __future__ import annotations

import asyncio
from uuid import UUID

import asyncpg
import pytest
from metering import (
    GATEWAY,
    NOW,
    TOKENS,
    Books,
    Pool,
    closed,
    event,
    opened,
    running,
    silence,
    tables,
)

from tenants import queries
from tenants.queries import Closing
from tenants.reaper import BOOK_GRACE_S, FORGET_S, PAGE, SILENT_S, Reaper
from tenants.usage import Outcome, RequestId, Source, Tokens, UsageOpen

LONG = NOW + 10_000
LOST = event(Outcome.GATEWAY_LOST, Source.BOOK)


@pytest.fixture
def books() -> Books:
    return Books()


async def leave_open(pool: Pool, *rows: UsageOpen) -> None:
    await queries.all_usage_open(pool, rows)


async def leave_pending(pool: Pool, *rows: UsageOpen) -> None:
    closes = [closed(row, outcome=Outcome.CLIENT_GONE, source=None, tokens=Tokens(), ended_at=NOW) for row in rows]
    await queries.all_usage_pending(pool, [Closing(row, close) for row, close in zip(rows, closes, strict=True)])


async def test_i1_rows_of_a_dead_gateway_are_closed_from_the_book(db_pool: Pool, books: Books) -> None:
    rows = [opened() for _ in range(3)]
    await leave_open(db_pool, *rows)
    for row in rows:
        books.write(row, TOKENS)
    reaper = Reaper(db_pool, books.find)
    await silence(db_pool, -5)
    assert await reaper.sweep(LONG) == 0
    await silence(db_pool, SILENT_S - 0.5)
    assert await reaper.sweep(LONG) == 0
    await silence(db_pool, SILENT_S + 0.1)
    assert await reaper.sweep(LONG) == 3
    assert await reaper.sweep(LONG) == 0
    after = await tables(db_pool)
    assert (after.opens, after.events) == ({}, {row.request_id: [LOST] for row in rows})


async def test_rows_of_a_living_gateway_are_left_alone_however_old(db_pool: Pool, books: Books) -> None:
    await leave_open(db_pool, opened(received_at=0.0))
    await silence(db_pool, -5)
    assert await Reaper(db_pool, books.find).sweep(LONG) == 0
    assert books.asked == 0


async def test_i1_rows_of_a_gateway_that_is_not_on_the_list_are_closed_too(db_pool: Pool, books: Books) -> None:
    await leave_open(db_pool, old := opened())
    assert await Reaper(db_pool, books.find).sweep(LONG) == 1
    assert (await tables(db_pool)).events == {old.request_id: [event(Outcome.GATEWAY_LOST, Source.NONE, Tokens())]}


async def test_a_new_row_of_a_gateway_that_is_not_on_the_list_yet_is_left_alone(db_pool: Pool, books: Books) -> None:
    now = await db_pool.fetchval("SELECT extract(epoch FROM now())::float8")
    await leave_open(db_pool, opened(received_at=now))
    assert await Reaper(db_pool, books.find).sweep(now) == 0


async def test_i2_what_a_client_left_gets_the_books_tokens_once_all_its_sequences_are_there(
    db_pool: Pool, books: Books
) -> None:
    row = opened(stream=False, sequences=2)
    await leave_pending(db_pool, row)
    await silence(db_pool, -5)
    reaper = Reaper(db_pool, books.find)
    assert await reaper.sweep(NOW + 1) == 0
    books.write(row, Tokens(prompt=5, completion=1), lines=1)
    assert await reaper.sweep(NOW + 2) == 0
    books.write(row, TOKENS, lines=2)
    assert await reaper.sweep(NOW + 3) == 1
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.CLIENT_GONE, Source.BOOK)]}


async def test_what_no_book_knows_is_closed_with_nothing_after_the_grace(db_pool: Pool, books: Books) -> None:
    row = opened(stream=False)
    await leave_pending(db_pool, row)
    reaper = Reaper(db_pool, books.find)
    assert await reaper.sweep(NOW + BOOK_GRACE_S - 0.1) == 0
    assert await reaper.sweep(NOW + BOOK_GRACE_S) == 1
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.CLIENT_GONE, Source.NONE, Tokens())]}
    assert await db_pool.fetchval("SELECT detail FROM usage_event") == "no engine book has it"


async def test_a_book_that_can_not_be_read_keeps_its_row_open_and_no_other(db_pool: Pool, books: Books) -> None:
    bad, good = opened(stream=False), opened(stream=False)
    await leave_pending(db_pool, bad, good)
    books.write(good, TOKENS)

    async def find(request: RequestId, attempt: int, since: float) -> object:
        if request == bad.request_id:
            raise PermissionError("book.jsonl")
        return await books.find(request, attempt, since)

    reaper = Reaper(db_pool, find)  # type: ignore[arg-type]
    assert await reaper.sweep(LONG) == 1
    after = await tables(db_pool)
    assert (list(after.events), list(after.opens)) == ([good.request_id], [bad.request_id])


async def test_a_row_that_can_not_be_closed_keeps_no_other_from_it(db_pool: Pool, books: Books) -> None:
    rows = [opened(stream=False) for _ in range(4)]
    await leave_pending(db_pool, *rows)
    for row in rows:
        books.write(row, TOKENS)
    books.write(rows[1], Tokens(prompt=2**70))
    assert await Reaper(db_pool, books.find).sweep(LONG) == 3
    assert list((await tables(db_pool)).opens) == [rows[1].request_id]


async def test_more_rows_than_a_page_are_closed_in_one_sweep_though_some_have_to_wait(
    db_pool: Pool, books: Books
) -> None:
    waiting = [opened(stream=False) for _ in range(PAGE + 10)]
    ready = [opened(stream=False) for _ in range(PAGE)]
    await leave_pending(db_pool, *waiting, *ready)
    for row in ready:
        books.write(row, TOKENS)
    assert await Reaper(db_pool, books.find).sweep(NOW) == len(ready)
    assert len((await tables(db_pool)).opens) == len(waiting)


async def test_i1_two_reapers_at_once_close_each_row_once(db_pool: Pool, books: Books) -> None:
    rows = [opened() for _ in range(300)]
    await leave_open(db_pool, *rows)
    await silence(db_pool, 60)
    for row in rows:
        books.write(row, TOKENS)
    reapers = [Reaper(db_pool, books.find) for _ in range(4)]
    counts = await asyncio.gather(*(reaper.sweep(LONG) for reaper in reapers))
    assert sum(counts) == 300
    after = await tables(db_pool)
    assert (after.opens, after.events) == ({}, {row.request_id: [LOST] for row in rows})


async def test_i1_reaper_and_gateway_closing_the_same_requests_at_once_leave_one_final_event_each(
    db_pool: Pool, books: Books
) -> None:
    async with running(db_pool) as ledger:
        rows = [opened() for _ in range(300)]
        await asyncio.gather(*(ledger.open(row) for row in rows))
        for row in rows:
            books.write(row, TOKENS)
        await silence(db_pool, 60)
        sweeps = [asyncio.create_task(Reaper(db_pool, books.find).sweep(LONG)) for _ in range(2)]
        closing = []
        for row in rows:
            closing.append(ledger.close(closed(row)))
            await asyncio.sleep(0)
        await asyncio.gather(*closing, *sweeps)
    after = await tables(db_pool)
    after.check_i1()
    assert after.opens == {}
    assert {replaced.outcome for row in rows for replaced in after.last(row.request_id)} == {Outcome.COMPLETED}
    assert {row.request_id: len(after.last(row.request_id)) for row in rows} == {row.request_id: 1 for row in rows}


async def test_a_row_that_its_gateway_has_locked_is_left_to_it_without_waiting(db_pool: Pool, books: Books) -> None:
    row = opened()
    await leave_open(db_pool, row)
    await silence(db_pool, 60)
    async with db_pool.acquire() as gateway, gateway.transaction():
        await queries.all_usage_close(gateway, [Closing(row, closed(row))])
        async with asyncio.timeout(1):
            assert await Reaper(db_pool, books.find).sweep(LONG) == 0
    assert (await tables(db_pool)).events == {row.request_id: [event()]}


async def test_i1_a_gateway_that_meets_the_reaper_in_its_commit_says_it_again(db_pool: Pool) -> None:
    row = opened()
    await leave_open(db_pool, row)
    lost = closed(row, outcome=Outcome.GATEWAY_LOST, source=Source.BOOK)
    async with db_pool.acquire() as reaper, reaper.transaction():
        await queries.all_usage_close(reaper, [Closing(row, lost)])
        gateway = asyncio.create_task(queries.all_usage_close(db_pool, [Closing(row, closed(row))]))
        while not await reaper.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
            await asyncio.sleep(0.001)
    assert await gateway == set()
    assert await queries.all_usage_close(db_pool, [Closing(row, closed(row))]) == {(row.request_id, 1)}
    after = await tables(db_pool)
    after.check_i1()
    assert after.events == {row.request_id: [LOST, event(revision=1)]}


async def test_i1_a_ledger_that_meets_the_reaper_in_its_commit_has_the_last_word(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        row = opened()
        await ledger.open(row)
        lost = closed(row, outcome=Outcome.GATEWAY_LOST, source=Source.BOOK)
        async with db_pool.acquire() as reaper, reaper.transaction():
            await queries.all_usage_close(reaper, [Closing(row, lost)])
            closing = ledger.close(closed(row))
            while not await reaper.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                await asyncio.sleep(0.001)
        await closing
        assert (await tables(db_pool)).events == {row.request_id: [LOST, event(revision=1)]}


async def test_a_row_that_became_pending_since_it_was_read_is_left_for_the_next_sweep(
    db_pool: Pool, books: Books
) -> None:
    row = opened(stream=False)
    await leave_open(db_pool, row)
    await silence(db_pool, 60)

    async def find(request: RequestId, attempt: int, since: float) -> object:
        if books.asked == 0:  # the gateway comes back while the book is read
            await leave_pending(db_pool, row)
        return await books.find(request, attempt, since)

    reaper = Reaper(db_pool, find)  # type: ignore[arg-type]
    assert await reaper.sweep(LONG) == 0
    books.write(row, TOKENS)
    assert await reaper.sweep(LONG) == 1
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.CLIENT_GONE, Source.BOOK)]}


async def test_a_gateway_whose_lease_is_back_when_its_row_would_be_closed_keeps_it(db_pool: Pool, books: Books) -> None:
    row = opened()
    await leave_open(db_pool, row)
    await silence(db_pool, 60)

    async def find(request: RequestId, attempt: int, since: float) -> object:
        await silence(db_pool, -10)
        return await books.find(request, attempt, since)

    assert await Reaper(db_pool, find).sweep(LONG) == 0  # type: ignore[arg-type]
    assert (await tables(db_pool)).opens == {row.request_id: [1]}


async def test_instances_that_were_silent_for_long_are_forgotten_unless_something_is_open(
    db_pool: Pool, books: Books
) -> None:
    other = str(UUID(int=7))
    await silence(db_pool, FORGET_S + 10)
    await silence(db_pool, FORGET_S + 10, other)
    await silence(db_pool, FORGET_S - 10, str(UUID(int=8)))
    await leave_pending(db_pool, opened(gateway=other, stream=False))
    await Reaper(db_pool, books.find).sweep(NOW)
    left = await db_pool.fetch("SELECT id FROM instance")
    assert {row["id"] for row in left} == {UUID(int=7), UUID(int=8)}
    assert GATEWAY not in {str(row["id"]) for row in left}


async def test_without_postgres_a_sweep_fails_and_nothing_is_lost(db_pool: Pool, books: Books) -> None:
    await db_pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await Reaper(db_pool, books.find).sweep(NOW)
