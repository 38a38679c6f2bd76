"""Reads the engine books: what each engine itself says that a request took.

A book is `<engines>/<engine id>/book.jsonl`, written by the engine (`engines.host.book` says what is in a line) and
read here by others, after the engine's or the gateway's death too. A request's sequences have a line each, and lines
add up. A book may be missing, still growing, or end in half a line; that half is nobody's yet. If somebody rotates
books, the older ones are `book.jsonl.1` and so on and are read as well.

Reading is synchronous: callers in an event loop use a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from engines.model import EngineId

BOOK: Final = "book.jsonl"
CHUNK_BYTES: Final = 1 << 20
CLOCK_SLACK_S: Final = 1.0
"""A file's time of change comes from a coarser clock than `since`."""


class BookEntry(Struct, frozen=True, kw_only=True):
    """What one engine's book says of one attempt of a request: the sum of its lines."""

    engine: EngineId
    prompt: int
    cached: int
    """Of `prompt`."""
    completion: int
    lines: int
    """Sequences that have ended; the attempt is complete when they are as many as it had."""
    finished_at: float
    """When the last of them ended, in seconds since the epoch."""


class _Line(Struct, frozen=True):
    request_id: str
    prompt: int
    cached: int
    completion: int
    at: float


_decoder = msgspec.json.Decoder(_Line)


def engine_request_id(request_id: str, attempt: int) -> str:
    """What an attempt is called at the engine and in its book: the request's id, from the second on with its number."""
    return request_id if attempt == 1 else f"{request_id}.{attempt}"


class BookShelf:
    """The books of all engines of this machine; holds nothing open."""

    def __init__(self, engines_path: Path) -> None:
        self._path = engines_path

    def find(self, request_id: str, attempt: int, since: float) -> BookEntry | None:
        """What the books say of an attempt that began at `since` (seconds since the epoch); `None` if nothing.

        Books that have not changed since then are not opened. Raises `OSError` if a book is there but can't be read.
        """
        wanted = engine_request_id(request_id, attempt)
        for engine, files in self._changed(since - CLOCK_SLACK_S):
            lines = [line for file in files for line in _lines(file, wanted)]
            if lines:
                return BookEntry(
                    engine=engine,
                    prompt=sum(line.prompt for line in lines),
                    cached=sum(line.cached for line in lines),
                    completion=sum(line.completion for line in lines),
                    lines=len(lines),
                    finished_at=max(line.at for line in lines),
                )
        return None

    def _changed(self, since: float) -> Iterator[tuple[EngineId, list[Path]]]:
        """Engines whose books changed at `since` or later, last changed first, with those books."""
        shelf: list[tuple[float, EngineId, list[Path]]] = []
        with contextlib.suppress(FileNotFoundError):
            for directory in self._path.iterdir():
                times = {file: _changed_at(file) for file in directory.glob(f"{BOOK}*")}
                fresh = [file for file, at in times.items() if at >= since]
                if fresh:
                    shelf.append((max(times.values()), EngineId(directory.name), fresh))
        for _, engine, files in sorted(shelf, reverse=True, key=lambda entry: entry[0]):
            yield engine, files


def _changed_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return float("-inf")


def _lines(file: Path, wanted: str) -> Iterator[_Line]:
    """The whole lines of a book that are about this engine request."""
    needle = msgspec.json.encode(wanted)
    with contextlib.suppress(FileNotFoundError), file.open("rb") as book:
        rest = b""
        while chunk := book.read(CHUNK_BYTES):
            whole, _, rest = (rest + chunk).rpartition(b"\n")
            if needle not in whole:
                continue
            for text in whole.split(b"\n"):
                line = _parse(text) if needle in text else None
                if line is not None and line.request_id == wanted:
                    yield line


def _parse(line: bytes) -> _Line | None:
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None  # a line that a crash of the machine cut short, with the next one behind it
