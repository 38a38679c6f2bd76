"""Stamps of a start-up."""

from __future__ import annotations

import json
import time
from pathlib import Path

from engines.host import phases


def test_stamps_are_lines_with_the_monotonic_clock_in_microseconds(tmp_path: Path) -> None:
    before = time.monotonic_ns() // 1000
    for phase in (phases.FORK, phases.CONFIG):
        phases.stamp(tmp_path / "phases.jsonl", phase)
    after = time.monotonic_ns() // 1000
    stamps = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert [stamp["phase"] for stamp in stamps] == ["fork", "config"]
    assert before <= stamps[0]["at_us"] <= stamps[1]["at_us"] <= after
