"""An engine's log: its end, across a rotation, and the rotation itself."""

from __future__ import annotations

import os
from pathlib import Path

from engines.launchers import local_log


def test_the_tail_is_the_last_lines_oldest_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\nthree\nfour")
    assert local_log.tail(log, 2) == ("three", "four")
    assert local_log.tail(log, 10) == ("one", "two", "three", "four")
    assert local_log.tail(log, 0) == ()


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert local_log.tail(tmp_path / "log", 10) == ()


def test_the_tail_goes_on_in_the_older_log(tmp_path: Path) -> None:
    (tmp_path / "log.1").write_text("one\ntwo\n")
    (tmp_path / "log").write_text("three\n")
    assert local_log.tail(tmp_path / "log", 2) == ("two", "three")
    assert local_log.tail(tmp_path / "log", 1) == ("three",)


def test_what_is_no_text_is_made_fit_for_a_database(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\0\0ab\xffc\n" + b"x" * 10_000 + b"\n")
    first, second = local_log.tail(tmp_path / "log", 5)
    assert first == "ab\ufffdc"
    assert len(second) == local_log.LINE_CHARACTERS


def test_only_the_end_of_a_large_log_is_read_and_no_part_of_a_line_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {number:06}\n" for number in range(100_000)))
    lines = local_log.tail(tmp_path / "log", 1_000_000)
    assert lines[-1] == "line 099999"
    assert len(lines) < 100_000 and all(len(line) == len("line 000000") for line in lines)


def test_a_log_within_its_limit_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("short\n")
    assert not local_log.rotate(tmp_path / "log", 6)
    assert not local_log.rotate(tmp_path / "none", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_rotated_log_goes_on_at_its_beginning_for_a_process_that_has_it_open(tmp_path: Path) -> None:
    log = tmp_path / "log"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"one\ntwo\nthree\n")
    assert local_log.rotate(log, 10)
    os.write(descriptor, b"four\n")
    os.close(descriptor)
    assert log.read_text() == "four\n"
    assert (tmp_path / "log.1").read_text() == "two\nthree\n"
    assert (tmp_path / "log.1").stat().st_mode & 0o777 == 0o600
    assert local_log.tail(log, 3) == ("two", "three", "four")


def test_a_second_rotation_replaces_the_older_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in ("first line\n", "second line\n"):
        log.write_text(text)
        assert local_log.rotate(log, 8)
    assert (tmp_path / "log.1").read_text() == "nd line\n"
    assert log.read_text() == ""
