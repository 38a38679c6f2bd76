"""Reading engines' logs where they lie: the end of one, or what has come since.

    <engines>/<id>/log          being written
    <engines>/<id>/log.1        the one before, if it grew beyond its bound

A position is `<inode>.<offset>`, so that a reader who follows notices when the log was rotated or begun anew, and still
gets the end of the old one. Everything here blocks for one small read: call it in a thread. Reading changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

from engines.model import EngineId

CHUNK: Final = 256 << 10
"""Most bytes of log that one answer has."""


class LogPart(Struct, frozen=True):
    """Whole lines of a log, oldest first, and where to go on."""

    lines: tuple[str, ...]
    position: str
    """For `since`; empty if there is no log."""


class EngineLogs:
    """The logs under one folder, one sub-folder an engine."""

    def __init__(self, engines: Path) -> None:
        self.folder = engines

    def tail(self, engine: EngineId, lines: int) -> LogPart:
        """At most the last `lines` lines, and at most `CHUNK` bytes; the position is the end of the log."""
        try:
            with self._paths(engine)[0].open("rb") as log:
                size = os.fstat(log.fileno()).st_size
                start = max(0, size - CHUNK)
                log.seek(start)
                text = log.read(size - start)
                if start:
                    text = text.partition(b"\n")[2]
                return LogPart(_lines(text)[-lines:] if lines else (), _position(log, size))
        except OSError:
            return LogPart((), "")

    def since(self, engine: EngineId, position: str) -> LogPart:
        """Whole lines after a position that an earlier answer gave; from the beginning if that log is gone."""
        inode, offset = _parse(position)
        current, before = self._paths(engine)
        for path in (current, before):
            part = _read(path, offset, inode)
            if part is not None and (part.lines or path == current):
                return part
        return _read(current, 0) or LogPart((), position)

    def _paths(self, engine: EngineId) -> tuple[Path, Path]:
        """The log, then the one before it."""
        folder = self.folder / engine
        return folder / "log", folder / "log.1"


def _read(path: Path, offset: int, inode: int | None = None) -> LogPart | None:
    """Whole lines from `offset` on; a line longer than `CHUNK` comes in pieces. `None` if it isn't that file."""
    try:
        with path.open("rb") as log:
            status = os.fstat(log.fileno())
            if inode not in {None, status.st_ino} or status.st_size < offset:
                return None
            log.seek(offset)
            text = log.read(CHUNK)
            end = text.rfind(b"\n") + 1
            if end == 0 and len(text) == CHUNK:
                end = len(text)
            return LogPart(_lines(text[:end]), _position(log, offset + end))
    except OSError:
        return None


def _lines(text: bytes) -> tuple[str, ...]:
    return tuple(text.decode(errors="replace").splitlines())


def _position(log: BinaryIO, offset: int) -> str:
    return f"{os.fstat(log.fileno()).st_ino}.{offset}"


def _parse(position: str) -> tuple[int, int]:
    inode, _, offset = position.partition(".")
    return (int(inode), int(offset)) if inode.isdecimal() and offset.isdecimal() else (0, 0)
