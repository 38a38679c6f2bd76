"""What the ledger makes of a close before it is written, and how a batch with a bad row is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metering import ENGINE, NOW, closed, opened

from tenants.entries import DETAIL_MAX, clean, lost, write
from tenants.usage import Outcome, Source, Tokens


def test_a_good_close_is_written_as_it_is() -> None:
    close = closed(opened(), detail="the engine answered 500")
    assert clean(close) == close


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=2 * DETAIL_MAX))
def test_any_detail_becomes_text_that_postgres_takes(detail: str) -> None:
    text = clean(closed(opened(), detail=f"{detail}\0\ud800")).detail
    assert text is not None
    assert "\0" not in text
    assert len(text) <= DETAIL_MAX
    assert msgspec.json.decode(msgspec.json.encode(text)) == text


@pytest.mark.parametrize(("engine", "kept"), [(ENGINE, ENGINE), ("no uuid", None), ("", None), (None, None)])
def test_an_engine_that_is_no_uuid_is_left_out(engine: str | None, kept: str | None) -> None:
    assert clean(closed(opened(), engine=engine)).engine == kept


def test_the_tokens_of_a_failed_attempt_are_not_waited_for() -> None:
    failed = closed(opened(), outcome=Outcome.ENGINE_FAILED, final=False, source=None)
    assert clean(failed) == msgspec.structs.replace(failed, source=Source.NONE, tokens=Tokens())
    assert clean(closed(opened(), source=None)).source is None


def test_the_end_of_a_lost_attempt_is_now_and_never_before_its_receipt() -> None:
    assert lost(opened(), NOW + 2.5).duration_us == 2_500_000
    assert lost(opened(), NOW - 1).duration_us == 0


@given(st.lists(st.booleans(), min_size=1, max_size=40))
async def test_a_bad_row_spoils_no_other(bad: list[bool]) -> None:
    written: list[int] = []
    calls = 0

    async def statement(rows: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        if any(bad[row] for row in rows):
            raise ValueError
        written.extend(rows)

    poison = await write(range(len(bad)), statement)
    assert sorted(poison) == [row for row, is_bad in enumerate(bad) if is_bad]
    assert sorted(written) == [row for row, is_bad in enumerate(bad) if not is_bad]
    assert calls <= 1 + 2 * sum(bad) * max(1, math.ceil(math.log2(len(bad))))
