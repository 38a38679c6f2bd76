"""The server's pepper: keys the HMAC of every API key. In the settings, or a file that only Greenroom's user can read.

Never in a log, a child that runs engines, or the database.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from app.refusal import Refused
from app.settings import Settings


class PepperMissing(Refused):
    """There is no pepper; the message is one line that says where it was looked for."""


def load(settings: Settings) -> bytes:
    """The pepper. Raises `PepperMissing`."""
    if settings.pepper:
        return settings.pepper.encode()
    path = _path(settings)
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        raise PepperMissing(f"no pepper in {path}: run `greenroom migrate`, or set GREENROOM_PEPPER") from None
    except OSError as error:
        raise PepperMissing(f"can't read the pepper in {path}: {error.strerror}") from None
    if not text:
        raise PepperMissing(f"the pepper in {path} is empty: restore it")
    return text.encode()


def create(settings: Settings) -> bytes:
    """The pepper, made now if there is none."""
    if not settings.pepper and not _path(settings).exists():
        write_private(_path(settings), secrets.token_hex(32) + "\n")
    return load(settings)


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read (0600), durably and all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    partial.rename(path)


def _path(settings: Settings) -> Path:
    return settings.data_path / "pepper"
