"""What the reaper makes of a left row and what the books say: a table and two timelines."""

from __future__ import annotations

import pytest
from metering import ENGINE, NOW, TOKENS, closed, opened
from msgspec.structs import replace

from tenants.queries import LeftOpen
from tenants.reaper import BOOK_GRACE_S, SILENT_S, closing_of
from tenants.usage import BookTotals, Outcome, Source, Tokens, UsageClose

WHOLE = BookTotals(TOKENS, 1, ENGINE, NOW + 1.25)


def pending(sequences: int = 1) -> LeftOpen:
    row = opened(stream=False, sequences=sequences)
    close = closed(
        row, outcome=Outcome.CLIENT_GONE, source=None, tokens=Tokens(), ended_at=NOW, engine=None, held_us=7, cold=True
    )
    return LeftOpen(row, close, "{}", -9.0)


def dead(silent_s: float, sequences: int = 1) -> LeftOpen:
    return LeftOpen(opened(sequences=sequences), None, None, silent_s)


def test_a_pending_row_waits_for_its_book_and_takes_it_at_once_when_it_is_there() -> None:
    row = pending()
    assert closing_of(row, None, NOW + BOOK_GRACE_S - 0.1) is None
    assert row.pending is not None
    expected = replace(row.pending, source=Source.BOOK, tokens=TOKENS, engine=ENGINE)
    assert closing_of(row, WHOLE, NOW) == expected


def test_a_pending_row_waits_for_all_its_sequences_and_then_takes_what_is_there() -> None:
    row, two = pending(sequences=3), replace(WHOLE, lines=2)
    assert closing_of(row, two, NOW + BOOK_GRACE_S - 0.1) is None
    closing = closing_of(row, two, NOW + BOOK_GRACE_S)
    assert closing is not None
    assert (closing.source, closing.tokens, closing.detail) == (Source.BOOK, TOKENS, "the book has 2 of 3 sequences")
    assert closing_of(row, replace(WHOLE, lines=3), NOW) is not None


def test_a_pending_row_of_which_no_book_knows_costs_nothing_and_says_why() -> None:
    row = pending()
    assert row.pending is not None
    expected = replace(row.pending, source=Source.NONE, tokens=Tokens(), detail="no engine book has it")
    assert closing_of(row, None, NOW + BOOK_GRACE_S) == expected
    said = replace(row, pending=replace(row.pending, detail="left while loading"))
    closing = closing_of(said, None, NOW + BOOK_GRACE_S)
    assert closing is not None
    assert closing.detail == "left while loading; no engine book has it"


def test_a_dead_gateways_row_is_entered_as_lost_with_the_books_tokens_and_time() -> None:
    row = dead(SILENT_S)
    assert closing_of(row, WHOLE, NOW + 60) == UsageClose(
        request_id=row.open.request_id,
        attempt=1,
        outcome=Outcome.GATEWAY_LOST,
        final=True,
        source=Source.BOOK,
        tokens=TOKENS,
        ended_at=NOW + 1.25,
        engine=ENGINE,
        duration_us=1_250_000,
    )


@pytest.mark.parametrize(("silent_s", "closes"), [(SILENT_S, False), (BOOK_GRACE_S - 0.1, False), (BOOK_GRACE_S, True)])
def test_a_dead_gateways_row_without_a_book_waits_for_the_engine_to_notice(silent_s: float, closes: bool) -> None:
    closing = closing_of(dead(silent_s), None, NOW + 100)
    assert (closing is not None) == closes
    if closing is not None:
        assert (closing.source, closing.tokens) == (Source.NONE, Tokens())
        assert closing.ended_at == NOW + 100 - silent_s  # when its lease ended


def test_a_clock_that_went_back_makes_no_negative_times() -> None:
    for totals in (replace(WHOLE, finished_at=NOW - 5), None):
        closing = closing_of(dead(60), totals, NOW - 100)
        assert closing is not None
        assert (closing.ended_at, closing.duration_us) == (NOW, 0)
