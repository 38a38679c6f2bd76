"""`/admin/v1/usage`: the ledger's sums, as JSON in pages or as CSV in one go.

?by=workspace,variant,day     what to split by: workspace, variant, key, and hour or day (UTC); this is the default
&from=2026-11-01&to=…         dates or RFC 3339 times; from (inclusive) the month's begin to (exclusive) now
&workspace=acme&variant=…&key=…
&format=csv                   or `Accept: text/csv`
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from litestar import Request, Response, get
from litestar.openapi import ResponseSpec
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream
from msgspec import UNSET, Struct, UnsetType

from app.admin.pages import After, Limit, cursor, moment, position
from app.admin.parts import AdminParts, Parts
from app.admin.problems import PROBLEMS, FieldInvalid
from tenants.queries import Split, all_usage_sums
from tenants.usage import UsageGroup, UsageSum

By = Annotated[str, QueryParameter(description="Comma-separated: workspace, variant, key, and hour or day.")]
From = Annotated[str | None, QueryParameter(name="from", description="Begin, inclusive: a date or RFC 3339 time.")]
To = Annotated[str | None, QueryParameter(description="End, exclusive; now if not given.")]
Format = Annotated[Literal["json", "csv"] | None, QueryParameter(description="Instead of the Accept header.")]

NUMBERS: Final = (
    "requests",
    "completed",
    "cold",
    "failed_attempts",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
_SPLITS: Final[tuple[Split, ...]] = get_args(Split)
_PARAMETERS: Final = frozenset(
    {"by", "from", "to", "workspace", "variant", "key", "format", "limit", "after"},
)
_CSV_PAGE: Final = 1000


class UsageRow(Struct, frozen=True, kw_only=True):
    """What one group used; the fields of the group are those that were asked for with `by`."""

    start: datetime | UnsetType = UNSET
    """Begin of the hour or day."""
    workspace: str | UnsetType = UNSET
    variant: str | UnsetType = UNSET
    key: str | UnsetType = UNSET
    requests: int
    completed: int
    """Of the requests, those answered in full."""
    cold: int
    """Of the requests, those that waited for an engine to start."""
    failed_attempts: int
    """Attempts that were repeated elsewhere; they cost nothing."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens, those that the engine had cached."""
    completion_tokens: int


class UsagePage(Struct, frozen=True, kw_only=True):
    """Some sums, and where the next ones are."""

    since: datetime = msgspec.field(name="from")
    until: datetime = msgspec.field(name="to")
    by: tuple[str, ...]
    data: tuple[UsageRow, ...]
    next: str | None


class _Question(Struct, frozen=True, kw_only=True):
    """What was asked, checked."""

    since: float
    until: float
    by: tuple[Split, ...]
    workspace: str | None
    variant: str | None
    key: str | None

    async def sums(self, parts: AdminParts, after: UsageGroup | None, limit: int) -> tuple[UsageSum, ...]:
        return await all_usage_sums(
            parts.pool,
            since=self.since,
            until=self.until,
            by=self.by,
            workspace=self.workspace,
            variant=self.variant,
            key=self.key,
            after=after,
            limit=limit,
        )


@get("/usage", tags=["usage"], responses={**PROBLEMS, 200: ResponseSpec(UsagePage, generate_examples=False)})
async def get_usage(
    *,
    request: Request[Any, Any, Any],
    parts: Parts,
    by: By = "workspace,variant,day",
    since: From = None,
    to: To = None,
    workspace: FromQuery[str | None] = None,
    variant: FromQuery[str | None] = None,
    key: FromQuery[str | None] = None,
    format: Format = None,  # noqa: A002 (the query parameter's name)
    limit: Limit = 500,
    after: After = None,
) -> Response[UsagePage] | Stream:
    """Requests and tokens, summed."""
    for name in request.query_params:
        if name not in _PARAMETERS:
            raise FieldInvalid(name, f"unknown parameter; there are {', '.join(sorted(_PARAMETERS))}")
    now = parts.clock()
    question = _Question(
        since=_time("from", since, _month(now)),
        until=_time("to", to, now),
        by=_splits(by),
        workspace=workspace,
        variant=variant,
        key=key,
    )
    if question.until < question.since:
        raise FieldInvalid("to", "is before `from`")
    if (format or _accepted(request)) == "csv":
        headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
        return Stream(_csv(parts, question), media_type="text/csv", headers=headers)
    found = await question.sums(parts, _group(after), limit + 1)
    shown = found[:limit]
    return Response(
        UsagePage(
            since=moment(question.since),
            until=moment(question.until),
            by=question.by,
            data=tuple(_row(entry, question.by) for entry in shown),
            next=_cursor(shown[-1].group) if len(found) > limit else None,
        )
    )


async def _csv(parts: AdminParts, question: _Question) -> AsyncIterator[str]:
    """All sums as CSV, a page at a time; no connection is held between pages."""
    yield _csv_lines([[*_columns(question.by), *NUMBERS]])
    after: UsageGroup | None = None
    while True:
        found = await question.sums(parts, after, _CSV_PAGE)
        rows = [msgspec.to_builtins(_row(entry, question.by)) for entry in found]
        yield _csv_lines([[row[name] for name in (*_columns(question.by), *NUMBERS)] for row in rows])
        if len(found) < _CSV_PAGE:
            return
        after = found[-1].group


def _csv_lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue()


def _columns(by: Sequence[Split]) -> list[str]:
    timed = "hour" in by or "day" in by
    return [*(["start"] if timed else []), *(name for name in ("workspace", "variant", "key") if name in by)]


def _row(entry: UsageSum, by: Sequence[Split]) -> UsageRow:
    group = entry.group
    return UsageRow(
        start=moment(group.start) if "hour" in by or "day" in by else UNSET,
        workspace=group.workspace if "workspace" in by else UNSET,
        variant=group.variant if "variant" in by else UNSET,
        key=group.key if "key" in by else UNSET,
        requests=entry.requests,
        completed=entry.completed,
        cold=entry.cold,
        failed_attempts=entry.failed_attempts,
        prompt_tokens=entry.prompt_tokens,
        cached_tokens=entry.cached_tokens,
        completion_tokens=entry.completion_tokens,
    )


def _splits(text: str) -> tuple[Split, ...]:
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    for part in wanted:
        if part not in _SPLITS:
            raise FieldInvalid("by", f"{part[:40]!r} is none of {', '.join(_SPLITS)}")
    if {"hour", "day"} <= wanted:
        raise FieldInvalid("by", "hour or day, not both")
    return tuple(split for split in _SPLITS if split in wanted)


def _time(field: str, text: str | None, default: float) -> float:
    """A date (its first moment in UTC) or a time, as seconds since the epoch."""
    if text is None:
        return default
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise FieldInvalid(field, f"{text[:40]!r} is neither a date like 2026-11-01 nor an RFC 3339 time") from None


def _month(now: float) -> float:
    return moment(now).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def _accepted(request: Request[Any, Any, Any]) -> str:
    return "csv" if request.accept.best_match(["application/json", "text/csv"]) == "text/csv" else "json"


def _cursor(group: UsageGroup) -> str:
    return cursor(msgspec.json.encode(group).decode())


def _group(after: str | None) -> UsageGroup | None:
    key = position(after)
    if key is None:
        return None
    try:
        return msgspec.json.decode(key, type=UsageGroup)
    except msgspec.DecodeError:
        raise FieldInvalid("after", "not a cursor of this API") from None


ROUTES = [get_usage]
