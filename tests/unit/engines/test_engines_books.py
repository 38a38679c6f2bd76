"""Books as files: what is found, summed and left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines import books
from engines.books import BookEntry, BookShelf
from engines.host.book import EngineBook
from engines.model import EngineId

REQUEST = "01926b3e-5f00-7000-8000-000000000001"
OTHER = "01926b3e-5f00-7000-8000-000000000002"
SINCE = 1_790_000_000.0


def line(request_id: str, *, prompt: int = 37, cached: int = 16, completion: int = 8, at: float = SINCE + 5) -> str:
    return json.dumps(
        {
            "request_id": request_id,
            "engine_request_id": f"chatcmpl-{request_id}-1a2b3c4d",
            "prompt": prompt,
            "cached": cached,
            "completion": completion,
            "reason": "stop",
            "start_us": 1,
            "end_us": 2,
            "at": at,
        }
    )


def write(
    shelf: Path, engine: str, *lines: str, changed: float = SINCE + 5, name: str = "book.jsonl", end: str = "\n"
) -> None:
    directory = shelf / engine
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("\n".join(lines) + end)
    os.utime(directory / name, (changed, changed))


def test_a_request_that_no_book_names_is_not_found(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(OTHER))
    assert BookShelf(tmp_path).find(REQUEST, 1, SINCE) is None


def test_no_folder_of_engines_is_an_empty_shelf(tmp_path: Path) -> None:
    assert BookShelf(tmp_path / "engines").find(REQUEST, 1, SINCE) is None


def test_engines_without_a_book_and_empty_books_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "e0").mkdir()
    write(tmp_path, "e1", end="")
    write(tmp_path, "e2", line(REQUEST))
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and found.engine == "e2"


def test_the_lines_of_several_sequences_add_up(tmp_path: Path) -> None:
    write(
        tmp_path,
        "e1",
        line(REQUEST, completion=8, at=SINCE + 5),
        line(OTHER, completion=100),
        line(REQUEST, prompt=0, cached=0, completion=12, at=SINCE + 7.5),
        line(REQUEST, prompt=0, cached=0, completion=3, at=SINCE + 6),
    )
    assert BookShelf(tmp_path).find(REQUEST, 1, SINCE) == BookEntry(
        engine=EngineId("e1"), prompt=37, cached=16, completion=23, lines=3, finished_at=SINCE + 7.5
    )


def test_attempts_are_told_apart_by_their_suffix(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(REQUEST, completion=1))
    write(tmp_path, "e2", line(f"{REQUEST}.2", completion=2))
    shelf = BookShelf(tmp_path)
    first, second = shelf.find(REQUEST, 1, SINCE), shelf.find(REQUEST, 2, SINCE)
    assert first is not None and (first.engine, first.completion) == ("e1", 1)
    assert second is not None and (second.engine, second.completion) == ("e2", 2)
    assert shelf.find(REQUEST, 3, SINCE) is None


def test_half_a_line_at_the_end_is_not_counted_until_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(REQUEST), line(REQUEST, prompt=0, cached=0), end="")
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and found.lines == 1
    write(tmp_path, "e1", line(REQUEST), line(REQUEST, prompt=0, cached=0))
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and found.lines == 2


def test_a_line_cut_by_a_crash_spoils_itself_alone(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(REQUEST)[:-9], line(REQUEST, completion=5))
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and (found.lines, found.completion) == (1, 5)


def test_a_request_id_within_other_text_is_no_match(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(f"x{REQUEST}"), line(REQUEST + "0"), json.dumps({"request_id": "a", "note": REQUEST}))
    assert BookShelf(tmp_path).find(REQUEST, 1, SINCE) is None


def test_rotated_books_are_read_as_well(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(REQUEST, completion=1), name="book.jsonl.1")
    write(tmp_path, "e1", line(REQUEST, prompt=0, cached=0, completion=2))
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and (found.lines, found.completion) == (2, 3)


def test_books_that_have_not_changed_since_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "e1", line(REQUEST), changed=SINCE - 60)
    assert BookShelf(tmp_path).find(REQUEST, 1, SINCE) is None
    assert BookShelf(tmp_path).find(REQUEST, 1, SINCE - 60) is not None


def test_a_book_longer_than_a_chunk_is_read_across_its_borders(tmp_path: Path) -> None:
    filler = [line(OTHER)] * (books.CHUNK_BYTES // len(line(OTHER)) + 1)
    half = filler[: len(filler) // 2]
    write(tmp_path, "e1", line(REQUEST), *filler, line(REQUEST), *half, line(REQUEST))
    found = BookShelf(tmp_path).find(REQUEST, 1, SINCE)
    assert found is not None and found.lines == 3


@pytest.mark.parametrize("prefix", ["chatcmpl-", "cmpl-"])
def test_what_the_engine_writes_is_what_is_found(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "e1").mkdir()
    suffix = "-0" if prefix == "cmpl-" else ""
    state = SimpleNamespace(
        request_id=f"{prefix}{REQUEST}.2{suffix}-1a2b3c4d",
        external_req_id=f"{prefix}{REQUEST}.2{suffix}",
        request_index=0,
        prompt_len=37,
        num_cached_tokens=16,
        detokenizer=SimpleNamespace(num_output_tokens=lambda: 8),
        stats=SimpleNamespace(scheduled_ts=1.0, queued_ts=0.5, last_token_ts=2.0, arrival_time=SINCE),
    )
    EngineBook(tmp_path / "e1" / "book.jsonl").write(state, "stop")
    found = BookShelf(tmp_path).find(REQUEST, 2, 0.0)
    assert found is not None
    assert (found.prompt, found.cached, found.completion, found.lines) == (37, 16, 8, 1)
