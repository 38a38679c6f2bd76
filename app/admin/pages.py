"""Lists come in pages: `?limit=100&after=<next of the page before>`; `next` is null on the last page.

A cursor is opaque to clients; it holds the key of the last entry, so what is added or removed meanwhile shifts nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

from litestar.params import QueryParameter
from msgspec import Struct

from app.admin.problems import FieldInvalid

T = TypeVar("T")
S = TypeVar("S")

Limit = Annotated[int, QueryParameter(ge=1, le=500, description="Entries a page.")]
After = Annotated[str | None, QueryParameter(description="`next` of the page before.")]


class Page(Struct, Generic[T], frozen=True):
    """Some entries, and where the next ones are."""

    data: tuple[T, ...]
    next: str | None


def page(found: Sequence[S], limit: int, key: Callable[[S], str], view: Callable[[S], T]) -> Page[T]:
    """The first `limit` of `found`, for which one more was asked than fits the page."""
    shown = found[:limit]
    return Page(tuple(view(entry) for entry in shown), cursor(key(shown[-1])) if len(found) > limit else None)


def cursor(key: str) -> str:
    """A key as a cursor."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def position(after: str | None) -> str | None:
    """The key in a cursor; raises `FieldInvalid` if it isn't one."""
    if after is None:
        return None
    try:
        return base64.b64decode(after + "=" * (-len(after) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise FieldInvalid("after", "not a cursor of this API") from None


def moment(at: float) -> datetime:
    """Seconds since the epoch as what JSON shows: RFC 3339 in UTC."""
    return datetime.fromtimestamp(at, UTC)


def moment_or_none(at: float | None) -> datetime | None:
    """The same for what may not have happened."""
    return None if at is None else moment(at)
