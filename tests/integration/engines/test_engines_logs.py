from __future__ import annotations

from pathlib import Path

import pytest

from engines.logs import CHUNK, EngineLogs, LogPart
from engines.model import EngineId

ENGINE = EngineId("e")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / ENGINE).mkdir()
    return tmp_path / ENGINE / "log"


@pytest.fixture
def logs(tmp_path: Path) -> EngineLogs:
    return EngineLogs(tmp_path)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_no_log_is_no_lines(logs: EngineLogs, log: Path) -> None:
    assert logs.tail(ENGINE, 10) == LogPart((), "")
    assert logs.since(ENGINE, "") == LogPart((), "")
    assert logs.since(ENGINE, "1.2") == LogPart((), "1.2")


def test_following_brings_every_line_once_and_none_in_halves(logs: EngineLogs, log: Path) -> None:
    append(log, "a\nb")
    part = logs.since(ENGINE, "")
    assert part.lines == ("a",)
    append(log, "b\nc\n")
    part = logs.since(ENGINE, part.position)
    assert part.lines == ("bb", "c")
    assert logs.since(ENGINE, part.position) == LogPart((), part.position)


def test_following_goes_through_a_log_that_was_moved_away(logs: EngineLogs, log: Path) -> None:
    append(log, "a\n")
    part = logs.tail(ENGINE, 10)
    append(log, "b\n")
    log.rename(log.with_name("log.1"))
    append(log, "c\n")
    part = logs.since(ENGINE, part.position)
    assert part.lines == ("b",)
    part = logs.since(ENGINE, part.position)
    assert part.lines == ("c",)


def test_following_begins_anew_in_a_log_that_was_cut(logs: EngineLogs, log: Path) -> None:
    append(log, "a\nb\n")
    part = logs.tail(ENGINE, 10)
    log.write_text("c\n")
    assert logs.since(ENGINE, part.position).lines == ("c",)


def test_a_long_log_comes_in_parts_and_its_tail_begins_with_a_whole_line(logs: EngineLogs, log: Path) -> None:
    lines = [f"{number:09}" for number in range(CHUNK // 4)]
    append(log, "\n".join(lines) + "\n")
    tail = logs.tail(ENGINE, 10**6).lines
    assert tail == tuple(lines[-len(tail) :])
    assert len(tail) > CHUNK // 11

    found: list[str] = []
    part = logs.since(ENGINE, "")
    while part.lines:
        found += part.lines
        part = logs.since(ENGINE, part.position)
    assert found == lines


def test_a_line_longer_than_a_part_does_not_stop_the_reader(logs: EngineLogs, log: Path) -> None:
    append(log, "x" * (CHUNK + 10) + "\nend\n")
    first = logs.since(ENGINE, "")
    assert first.lines == ("x" * CHUNK,)
    assert logs.since(ENGINE, first.position).lines == ("x" * 10, "end")


def test_bytes_that_are_no_text_are_shown_as_such(logs: EngineLogs, log: Path) -> None:
    log.write_bytes(b"\xff\x00ok\n")
    assert logs.tail(ENGINE, 5).lines == ("\ufffd\x00ok",)


@pytest.mark.parametrize("position", ["x", "1", "1.x", "-1.0", "1.-5", "9" * 30 + "." + "9" * 30])
def test_a_position_that_is_none_begins_anew(position: str, logs: EngineLogs, log: Path) -> None:
    append(log, "a\n")
    assert logs.since(ENGINE, position).lines == ("a",)
