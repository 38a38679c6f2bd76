"""The ledger's writing side against a real Postgres: what is durable when, and what an outage does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest
from metering import GATEWAY, NOW, TOKENS, Books, Pool, closed, event, opened, running, silence, tables

from app.stores import EmbeddedPostgres
from tenants.errors import LedgerUnavailable
from tenants.ledger import OPENS_MAX, Ledger
from tenants.reaper import Reaper
from tenants.usage import Outcome, Source, Tokens
from tests.conftest import psql

LONG = NOW + 10_000


@pytest.fixture
async def ledger(db_pool: Pool) -> AsyncIterator[Ledger]:
    async with running(db_pool) as running_ledger:
        yield running_ledger


class Outage:
    """Takes one database away and gives it back, while the server goes on."""

    def __init__(self, server: EmbeddedPostgres, url: str) -> None:
        self._server = server
        self._name = urlsplit(url).path.removeprefix("/")

    def begin(self) -> None:
        psql(self._server, f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false")
        self.cut()

    def cut(self) -> None:
        """End every connection, for the moment."""
        psql(self._server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'")

    def end(self) -> None:
        psql(self._server, f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true")


@pytest.fixture
def outage(postgres: EmbeddedPostgres, database: str) -> Outage:
    return Outage(postgres, database)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def backend(ledger: Ledger) -> int:
    """The pid of the server process that the ledger's connection has."""
    await until(lambda: ledger._connection is not None)
    assert ledger._connection is not None
    return ledger._connection.get_server_pid()


# One request ---------------------------------------------------------------------------------------------------------


async def test_i1_a_request_has_a_durable_row_before_it_goes_on_and_one_final_event_after(
    ledger: Ledger, db_pool: Pool
) -> None:
    row = opened(sequences=3, retry_count=2)
    await ledger.open(row)
    assert (await tables(db_pool)).opens == {row.request_id: [1]}
    await ledger.close(closed(row, first_token_us=7, queued_us=5, held_us=4, cold=True, detail="d"))
    after = await tables(db_pool)
    assert (after.opens, after.events) == ({}, {row.request_id: [event()]})
    written = await db_pool.fetchrow("SELECT *, extract(epoch FROM ended_at)::float8 AS ended FROM usage_event")
    assert written is not None
    expected = {
        "workspace": "acme",
        "key": "k1",
        "variant": "bot",
        "model": "smollm2",
        "endpoint": "chat",
        "stream": True,
        "cold": True,
        "ended": NOW + 1.5,
        "queued_us": 5,
        "held_us": 4,
        "first_token_us": 7,
        "duration_us": 1_500_000,
        "detail": "d",
        "trace_id": row.trace_id,
        "retry_count": 2,
    }
    assert {name: written[name] for name in expected} == expected


async def test_a_request_without_a_first_token_has_none(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    await ledger.open(row)
    await ledger.close(closed(row, outcome=Outcome.OVERLOADED, source=Source.NONE, tokens=Tokens(), engine=None))
    written = await db_pool.fetchrow("SELECT first_token_us, engine, source FROM usage_event")
    assert dict(written or {}) == {"first_token_us": None, "engine": None, "source": "none"}


async def test_a_close_that_comes_before_its_open_is_durable_waits_for_it(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    opening = ledger.open(row)
    closing = ledger.close(closed(row))
    assert not opening.done()
    await closing
    assert opening.done()
    assert (await tables(db_pool)).events == {row.request_id: [event()]}


async def test_i1_a_caller_who_leaves_while_its_open_is_written_still_gets_its_event(
    ledger: Ledger, db_pool: Pool
) -> None:
    row = opened()
    ledger.open(row).cancel()
    await ledger.close(closed(row, outcome=Outcome.CLIENT_GONE, source=Source.NONE, tokens=Tokens()))
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.CLIENT_GONE, Source.NONE, Tokens())]}


async def test_i1_closing_twice_writes_one_event_and_the_first_word_counts(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    await ledger.open(row)
    first = ledger.close(closed(row))
    assert ledger.close(closed(row, outcome=Outcome.DRAINED)) is first
    await first
    await ledger.close(closed(row, outcome=Outcome.DRAINED))
    assert (await tables(db_pool)).events == {row.request_id: [event()]}


async def test_closing_what_was_never_opened_writes_nothing(ledger: Ledger, db_pool: Pool) -> None:
    await ledger.close(closed(opened()))
    assert (await tables(db_pool)).events == {}


async def test_opening_twice_waits_for_the_same_row(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    assert ledger.open(row) is ledger.open(row)
    await ledger.open(row)
    await ledger.open(row)
    assert (await tables(db_pool)).opens == {row.request_id: [1]}


async def test_requests_of_one_moment_share_a_commit(database: str) -> None:
    statements: list[str] = []

    async def watch(connection: asyncpg.Connection[Any]) -> None:
        connection.add_query_logger(lambda record: statements.append(record.query))

    async with asyncpg.create_pool(database, min_size=0, max_size=2, init=watch) as pool, running(pool) as ledger:
        rows = [opened() for _ in range(300)]
        await asyncio.gather(*(ledger.open(row) for row in rows))
        await asyncio.gather(*(ledger.close(closed(row)) for row in rows))
        assert sum("INSERT INTO usage_open" in text and "usage_event" not in text for text in statements) == 1
        assert sum("INSERT INTO usage_event" in text for text in statements) == 1
        assert len((await tables(pool)).events) == 300


# Attempts ------------------------------------------------------------------------------------------------------------


async def test_i1_a_failed_attempt_and_the_row_of_the_next_are_one_commit(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    await ledger.open(row)
    await ledger.close(closed(row, outcome=Outcome.ENGINE_FAILED, final=False, source=None))
    between = await tables(db_pool)
    failed = event(Outcome.ENGINE_FAILED, Source.NONE, Tokens(), final=False)
    assert (between.events, between.opens) == ({row.request_id: [failed]}, {row.request_id: [2]})
    again = opened(request_id=row.request_id, attempt=2)
    await ledger.open(again)
    await ledger.close(closed(again))
    after = await tables(db_pool)
    assert (after.events, after.opens) == ({row.request_id: [failed, event(attempt=2)]}, {})


async def test_all_attempts_may_be_said_in_one_breath(ledger: Ledger, db_pool: Pool) -> None:
    rows = [opened()]
    rows += [opened(request_id=rows[0].request_id, attempt=attempt) for attempt in (2, 3)]
    for row in rows:
        ledger.open(row)
        ledger.close(closed(row, final=row.attempt == 3))
    await ledger.close(closed(rows[2]))
    after = await tables(db_pool)
    assert [(e.attempt, e.final) for e in after.events[rows[0].request_id]] == [(1, False), (2, False), (3, True)]
    assert after.opens == {}


async def test_i1_a_gateway_that_dies_between_two_attempts_leaves_the_request_open(db_pool: Pool) -> None:
    row = opened()
    async with running(db_pool) as ledger:
        await ledger.open(row)
        await ledger.close(closed(row, outcome=Outcome.ENGINE_FAILED, final=False, source=Source.NONE))
    await silence(db_pool, 60)
    await Reaper(db_pool, Books().find).sweep(LONG)
    after = await tables(db_pool)
    after.check_i1()
    assert after.last(row.request_id)[-1] == event(Outcome.GATEWAY_LOST, Source.NONE, Tokens(), attempt=2)


# Rows that can't be written ------------------------------------------------------------------------------------------


async def test_a_row_that_the_database_refuses_spoils_none_beside_it(ledger: Ledger, db_pool: Pool) -> None:
    good, bad, wrong = [opened() for _ in range(5)], opened(sequences=0), opened()
    opening = [ledger.open(row) for row in [*good[:2], bad, wrong, *good[2:]]]
    answers = await asyncio.gather(*opening, return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None)] * 2 + [LedgerUnavailable] + [type(None)] * 4
    closing = [ledger.close(closed(row)) for row in good]
    impossible = ledger.close(closed(wrong, tokens=Tokens(prompt=2**70)))
    with pytest.raises(LedgerUnavailable):
        await impossible
    await asyncio.gather(*closing)
    assert ledger.dropped == 1
    assert (await tables(db_pool)).events == {row.request_id: [event()] for row in good}


async def test_i1_a_close_that_can_not_be_written_is_left_to_the_reaper(ledger: Ledger, db_pool: Pool) -> None:
    row, books = opened(), Books()
    books.write(row, TOKENS)
    await ledger.open(row)
    with pytest.raises(LedgerUnavailable):
        await ledger.close(closed(row, tokens=Tokens(prompt=2**70)))
    await ledger.open(opened())  # a round in which the audit has run
    await Reaper(db_pool, books.find).sweep(LONG)
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.GATEWAY_LOST, Source.BOOK)]}


async def test_numbers_that_can_not_be_are_bounded(ledger: Ledger, db_pool: Pool) -> None:
    row = opened(retry_count=10**30)
    await ledger.open(row)
    close = closed(
        row,
        tokens=Tokens(prompt=-1, cached=7, completion=-5),
        queued_us=-1,
        held_us=-1,
        first_token_us=-1,
        duration_us=-1,
        detail="a\0b\ud800",
        engine="not-a-uuid",
    )
    await ledger.close(close)
    written = await db_pool.fetchrow(
        "SELECT queued_us, held_us, first_token_us, duration_us, detail, engine, retry_count FROM usage_event"
    )
    assert tuple(written or ()) == (0, 0, 0, 0, "ab?", None, 2**31 - 1)
    assert (await tables(db_pool)).events == {row.request_id: [event(tokens=Tokens())]}


# Outages -------------------------------------------------------------------------------------------------------------


async def test_i1_a_cut_connection_costs_nobody_anything(ledger: Ledger, db_pool: Pool, outage: Outage) -> None:
    rows = [opened() for _ in range(200)]
    for count, row in enumerate(rows):
        opening = ledger.open(row)
        if count % 40 == 0:
            outage.cut()
        await opening
        ledger.close(closed(row))
    await until(lambda: not ledger._live)
    after = await tables(db_pool)
    assert after.events == {row.request_id: [event()] for row in rows}
    assert after.opens == {}


async def test_while_postgres_is_away_opens_are_refused_in_seconds_and_closes_are_kept(
    ledger: Ledger, db_pool: Pool, outage: Outage
) -> None:
    before, during, after = opened(), opened(), opened()
    await ledger.open(before)
    outage.begin()
    closing = ledger.close(closed(before))
    async with asyncio.timeout(4.5):
        with pytest.raises(LedgerUnavailable):
            await ledger.open(during)
    assert not ledger.available
    assert ledger.backlog == 1
    assert not closing.done()
    await ledger.close(closed(during))  # it was refused: nothing to close
    outage.end()
    await closing
    await ledger.open(after)
    assert ledger.available
    written = await tables(db_pool)
    assert written.events == {before.request_id: [event()]}
    assert written.opens == {after.request_id: [1]}


async def test_a_short_outage_only_delays_opens(ledger: Ledger, db_pool: Pool, outage: Outage) -> None:
    await ledger.open(opened())
    outage.begin()
    opening = ledger.open(opened())
    await until(lambda: not ledger.available)
    outage.end()
    await opening


async def test_after_a_refused_second_attempt_the_request_can_still_be_closed(
    ledger: Ledger, db_pool: Pool, outage: Outage
) -> None:
    row = opened()
    await ledger.open(row)
    outage.begin()
    ledger.close(closed(row, outcome=Outcome.ENGINE_FAILED, final=False, source=Source.NONE))
    again = opened(request_id=row.request_id, attempt=2)
    with pytest.raises(LedgerUnavailable):
        await ledger.open(again)
    closing = ledger.close(closed(again, outcome=Outcome.ENGINE_FAILED, source=Source.NONE, tokens=Tokens()))
    outage.end()
    await closing
    after = await tables(db_pool)
    after.check_i1()
    assert after.last(row.request_id)[-1] == event(Outcome.ENGINE_FAILED, Source.NONE, Tokens(), attempt=2)


async def test_a_refused_open_whose_row_was_written_after_all_is_removed(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        await ledger.open(opened())
        await ledger.open(opened())  # lease and audit of the first round are through
        ledger._extended_at = asyncio.get_running_loop().time()  # nothing is under way that could fail before the open
        pid, row = await backend(ledger), opened()
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(LedgerUnavailable):
                await ledger.open(row)
        finally:
            os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(10):  # the frozen server process does what it had been sent, and ends
            while await db_pool.fetchval("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid):
                await asyncio.sleep(0.01)
        ledger._audit_at = 0.0
        await ledger.open(opened())
        await ledger.open(opened())  # the audit comes after the opens of its round
        after = await tables(db_pool)
    assert row.request_id not in after.opens
    assert row.request_id not in after.events


async def test_i1_a_refused_open_that_committed_without_an_answer_is_removed(db_pool: Pool) -> None:
    """The row is there, the ledger was never told: as when the connection broke in the commit and time ran out."""
    async with running(db_pool) as ledger:
        pid = await backend(ledger)
        row = opened()
        async with db_pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE usage_open IN SHARE MODE")
            with pytest.raises(LedgerUnavailable):
                await ledger.open(row)
        assert await backend(ledger) != pid
        await db_pool.execute(
            """INSERT INTO usage_open SELECT $1, 1, 'acme', 'k1', 'bot', 'm', 'chat', true, 1, $2, now(), 't' """,
            row.request_id,
            UUID(GATEWAY),
        )
        ledger._audit_at = 0.0
        await ledger.open(opened())
        await ledger.open(opened())
        after = await tables(db_pool)
    assert row.request_id not in after.opens
    assert row.request_id not in after.events


async def test_i1_closes_beyond_the_bound_are_dropped_counted_and_closed_from_the_book(
    db_pool: Pool, outage: Outage
) -> None:
    books, rows = Books(), [opened() for _ in range(6)]
    async with running(db_pool, backlog_max=2) as ledger:
        await asyncio.gather(*(ledger.open(row) for row in rows))
        outage.begin()
        closing = [ledger.close(closed(row)) for row in rows]
        assert ledger.dropped == 4
        assert [type(future.exception()) for future in closing[2:]] == [LedgerUnavailable] * 4
        outage.end()
        await asyncio.gather(*closing[:2])
        await ledger.open(opened(request_id=(other := opened()).request_id))
        await ledger.close(closed(other))
        for row in rows:
            books.write(row, TOKENS)
        await Reaper(db_pool, books.find).sweep(LONG)
        after = await tables(db_pool)
    assert after.opens == {}
    lost = {row.request_id: [event(Outcome.GATEWAY_LOST, Source.BOOK)] for row in rows[2:]}
    assert after.events == {row.request_id: [event()] for row in [*rows[:2], other]} | lost


async def test_too_many_opens_at_once_are_refused_at_once(db_pool: Pool) -> None:
    ledger = Ledger(db_pool, GATEWAY)
    for _ in range(OPENS_MAX):
        ledger.open(opened())
    refused = ledger.open(opened())
    assert isinstance(refused.exception(), LedgerUnavailable)


async def test_a_ledger_that_has_stopped_lets_nobody_wait(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        row = opened()
        await ledger.open(row)
    waiting = [ledger.open(opened()), ledger.close(closed(row))]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(answer) for answer in answers} == {LedgerUnavailable}


async def test_what_waits_when_a_ledger_is_stopped_hears_of_it(db_pool: Pool, outage: Outage) -> None:
    row = opened()
    async with running(db_pool) as ledger:
        await ledger.open(row)
        outage.begin()
        waiting = [ledger.open(opened()), ledger.close(closed(row))]
    outage.end()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(answer) for answer in answers} == {LedgerUnavailable}
    assert (await tables(db_pool)).opens == {row.request_id: [1]}


# The lease -----------------------------------------------------------------------------------------------------------


async def _lease(pool: Pool) -> float | None:
    left = await pool.fetchval("SELECT extract(epoch FROM lease_until - now())::float8 FROM instance")
    return None if left is None else float(left)


async def test_the_lease_is_there_before_the_first_row_and_is_extended(db_pool: Pool) -> None:
    async with running(db_pool, lease_s=5.0) as ledger:
        await ledger.open(opened())
        first = await _lease(db_pool)
        assert first is not None
        assert 4.0 < first <= 5.0
        await db_pool.execute("UPDATE instance SET lease_until = now()")
        async with asyncio.timeout(5):
            while (await _lease(db_pool) or 0.0) <= 1.0:
                await asyncio.sleep(0.05)


async def test_a_lease_whose_row_was_removed_is_back_before_another_row_is_open(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        await ledger.open(opened())
        await db_pool.execute("DELETE FROM instance")
        ledger._extended_at = 0.0  # as if this process had been frozen for a while
        await ledger.open(opened())
        assert (await _lease(db_pool) or 0.0) > 5


async def test_a_drained_ledger_has_written_all_and_is_off_the_list(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        rows = [opened() for _ in range(20)]
        for row in rows:
            ledger.open(row)
            ledger.close(closed(row))
        assert await ledger.drain(5.0) == 0
        assert await _lease(db_pool) is None
        assert len((await tables(db_pool)).events) == 20


async def test_a_drain_waits_for_requests_that_still_run(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        row = opened()
        await ledger.open(row)
        draining = asyncio.create_task(ledger.drain(5.0))
        await asyncio.sleep(0)
        ledger.close(closed(row, outcome=Outcome.DRAINED))
        assert await draining == 0


async def test_i1_a_drain_that_runs_out_of_time_leaves_its_lease_to_the_reaper(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        row = opened()
        await ledger.open(row)
        assert await ledger.drain(0.05) == 1
        assert await _lease(db_pool) is not None
    await silence(db_pool, 60)
    await Reaper(db_pool, Books().find).sweep(LONG)
    assert (await tables(db_pool)).events == {row.request_id: [event(Outcome.GATEWAY_LOST, Source.NONE, Tokens())]}


async def test_what_is_pending_does_not_keep_a_drained_gateway_on_the_list(db_pool: Pool) -> None:
    async with running(db_pool) as ledger:
        row = opened(stream=False)
        await ledger.open(row)
        await ledger.close(closed(row, outcome=Outcome.CLIENT_GONE, source=None, tokens=Tokens()))
        assert await ledger.drain(5.0) == 0
        assert await _lease(db_pool) is None
        assert (await tables(db_pool)).opens == {row.request_id: [1]}


# A gateway that was only cut off -------------------------------------------------------------------------------------


async def test_i1_the_close_of_a_gateway_that_lived_after_all_supersedes_the_reapers(
    ledger: Ledger, db_pool: Pool
) -> None:
    row, books = opened(), Books()
    books.write(row, Tokens(prompt=10, cached=4, completion=3))
    await ledger.open(row)
    await silence(db_pool, 60)
    await Reaper(db_pool, books.find).sweep(LONG)
    reaped = event(Outcome.GATEWAY_LOST, Source.BOOK, Tokens(prompt=10, cached=4, completion=3))
    assert (await tables(db_pool)).events == {row.request_id: [reaped]}
    await ledger.close(closed(row))
    after = await tables(db_pool)
    after.check_i1()
    assert after.events == {row.request_id: [reaped, event(revision=1)]}


async def test_numbers_of_the_book_stay_if_the_gateway_has_none(ledger: Ledger, db_pool: Pool) -> None:
    row, books = opened(), Books()
    books.write(row, TOKENS)
    await ledger.open(row)
    await silence(db_pool, 60)
    await Reaper(db_pool, books.find).sweep(LONG)
    await ledger.close(closed(row, outcome=Outcome.ENGINE_FAILED, source=Source.NONE, tokens=Tokens()))
    last = (await tables(db_pool)).last(row.request_id)
    assert last == [event(Outcome.ENGINE_FAILED, Source.BOOK, TOKENS, revision=1)]


async def test_i1_attempts_after_a_reaped_one_end_in_one_final_event(ledger: Ledger, db_pool: Pool) -> None:
    row = opened()
    await ledger.open(row)
    await silence(db_pool, 60)
    await Reaper(db_pool, Books().find).sweep(LONG)
    await ledger.close(closed(row, outcome=Outcome.ENGINE_FAILED, final=False, source=Source.NONE))
    (await tables(db_pool)).check_i1()
    again = opened(request_id=row.request_id, attempt=2)
    await ledger.open(again)
    await ledger.close(closed(again))
    after = await tables(db_pool)
    after.check_i1()
    assert after.events[row.request_id] == [
        event(Outcome.GATEWAY_LOST, Source.NONE, Tokens()),
        event(Outcome.ENGINE_FAILED, Source.NONE, TOKENS, revision=1, final=False),
        event(attempt=2, revision=1),
    ]


async def test_what_the_reaper_closed_is_left_to_it_again_if_only_the_book_knows(ledger: Ledger, db_pool: Pool) -> None:
    row, books = opened(stream=False), Books()
    await ledger.open(row)
    await silence(db_pool, 60)
    await Reaper(db_pool, books.find).sweep(LONG)
    await ledger.close(closed(row, outcome=Outcome.CLIENT_GONE, source=None, tokens=Tokens()))
    books.write(row, TOKENS)
    await Reaper(db_pool, books.find).sweep(LONG)
    after = await tables(db_pool)
    after.check_i1()
    assert after.last(row.request_id) == [event(Outcome.CLIENT_GONE, Source.BOOK, TOKENS, revision=1)]
