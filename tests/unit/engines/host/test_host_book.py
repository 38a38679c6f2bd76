"""Lines of the engine book from vLLM's request states."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.host.book import EngineBook, base_request_id, entry

REQUEST = "01926b3e-5f00-7000-8000-000000000001"


def state(**changes: Any) -> SimpleNamespace:
    """A request of 37 tokens that has made 8; it was scheduled at 100.5 s and made its last token at 101.25 s."""
    stats = SimpleNamespace(arrival_time=1_000_000.0, queued_ts=100.25, scheduled_ts=100.5, last_token_ts=101.25)
    fields: dict[str, Any] = {
        "request_id": f"chatcmpl-{REQUEST}-1a2b3c4d",
        "external_req_id": f"chatcmpl-{REQUEST}",
        "request_index": 0,
        "prompt_len": 37,
        "num_cached_tokens": 16,
        "detokenizer": SimpleNamespace(num_output_tokens=lambda: 8),
        "stats": stats,
    }
    return SimpleNamespace(**(fields | changes))


def test_a_finished_request_lasts_from_its_first_schedule_to_its_last_token() -> None:
    assert entry(state(), "stop", monotonic=102.0, at=1_000_002.0) == {
        "request_id": REQUEST,
        "engine_request_id": f"chatcmpl-{REQUEST}-1a2b3c4d",
        "prompt": 37,
        "cached": 16,
        "completion": 8,
        "reason": "stop",
        "start_us": 100_500_000,
        "end_us": 101_250_000,
        "at": 1_000_001.25,
    }


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_aborted_request_lasts_until_the_abort(reason: str) -> None:
    line = entry(state(), reason, monotonic=102.0, at=1_000_002.0)
    assert (line["start_us"], line["end_us"], line["at"]) == (100_500_000, 102_000_000, 1_000_002.0)


def test_a_request_aborted_before_it_was_scheduled_lasts_from_its_arrival() -> None:
    stats = SimpleNamespace(arrival_time=1_000_001.0, queued_ts=0.0, scheduled_ts=0.0, last_token_ts=0.0)
    line = entry(state(stats=stats), "abort", monotonic=102.0, at=1_000_002.0)
    assert (line["start_us"], line["end_us"]) == (101_000_000, 102_000_000)


def test_i2_a_prompt_is_entered_with_the_first_of_its_sequences_alone() -> None:
    lines = [entry(state(request_index=index), "stop", 102.0, 1_000_002.0) for index in range(3)]
    assert [(line["prompt"], line["cached"], line["completion"]) for line in lines] == [
        (37, 16, 8),
        (0, 0, 8),
        (0, 0, 8),
    ]


@pytest.mark.parametrize(
    ("external", "base"),
    [
        (f"chatcmpl-{REQUEST}", REQUEST),
        (f"chatcmpl-{REQUEST}.2", f"{REQUEST}.2"),
        (f"cmpl-{REQUEST}-0", REQUEST),
        (f"cmpl-{REQUEST}.2-11", f"{REQUEST}.2"),
        (f"embd-{REQUEST}-3", REQUEST),
        (REQUEST, REQUEST),
    ],
)
def test_the_request_id_is_what_the_client_sent(external: str, base: str) -> None:
    assert base_request_id(external) == base


def test_i2_a_sequence_that_ends_twice_is_entered_once(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    book, ended, other = EngineBook(path), state(), state(request_id="other")
    book.write(ended, "stop")
    book.write(ended, "abort")
    book.write(other, "abort")
    book.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["engine_request_id"], line["reason"]) for line in lines] == [
        (ended.request_id, "stop"),
        ("other", "abort"),
    ]


def test_an_engine_serves_on_when_its_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    book = EngineBook(Path("/dev/full"))
    book.write(state(), "stop")
    book.close()
    assert "the engine book lacks chatcmpl-" in capsys.readouterr().err


def test_a_book_that_was_begun_is_continued(tmp_path: Path) -> None:
    for _ in range(2):
        book = EngineBook(tmp_path / "book.jsonl")
        book.write(state(), "length")
        book.close()
    assert len((tmp_path / "book.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "book.jsonl").stat().st_mode & 0o777 == 0o600
