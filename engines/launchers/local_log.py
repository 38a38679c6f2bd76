"""An engine's log as a file that may grow without bound: kept short, and read from its end.

`log` is written by the engine's processes, which hold it open for appending; so it is rotated by copying it to `log.1`
and cutting it to nothing. What is written between the two is lost. Everything here blocks for small reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

TAIL_BYTES: Final = 256 << 10
LINE_CHARACTERS: Final = 4000


def tail(log: Path, lines: int) -> tuple[str, ...]:
    """The last lines of a log and the one before it, oldest first, each cut to `LINE_CHARACTERS`."""
    found: list[str] = []
    for path in (log, _older(log)):
        if len(found) < lines:
            found = _last_lines(path, lines - len(found)) + found
    return tuple(found)


def rotate(log: Path, limit: int) -> bool:
    """Cut the log to nothing if it is longer than `limit` bytes, of which the last are kept beside it; was it?"""
    try:
        size = log.stat().st_size
    except FileNotFoundError:
        return False
    if size <= limit:
        return False
    copy = log.with_name("log.new")
    with (
        log.open("rb") as source,
        os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target,
    ):
        source.seek(size - limit)
        shutil.copyfileobj(source, target)
    copy.replace(_older(log))
    os.truncate(log, 0)
    return True


def _older(log: Path) -> Path:
    return log.with_name("log.1")


def _last_lines(path: Path, lines: int) -> list[str]:
    if lines <= 0:
        return []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - TAIL_BYTES))
        text = file.read().replace(b"\0", b"")
        if start:
            text = text.partition(b"\n")[2]
        return [line[:LINE_CHARACTERS] for line in text.decode(errors="replace").splitlines()[-lines:]]
    return []
