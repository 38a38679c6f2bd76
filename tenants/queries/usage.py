"""Sums over `usage_event`. Each attempt counts with its highest revision; corrections are few and have an index."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

from asyncpg import Record

from tenants.queries.database import Database
from tenants.usage import UsageGroup, UsageSum

Split = Literal["workspace", "variant", "key", "hour", "day"]
"""What sums can be split by; `hour` and `day` (UTC) exclude each other."""

_SUMS: Final = """
    SELECT * FROM (
        SELECT CASE WHEN $6 = '' THEN 0
                    ELSE extract(epoch FROM date_trunc($6, received_at, 'UTC')) END::float8 AS start,
               CASE WHEN $7 THEN workspace ELSE '' END COLLATE "C" AS workspace,
               CASE WHEN $8 THEN variant ELSE '' END COLLATE "C" AS variant,
               CASE WHEN $9 THEN key ELSE '' END COLLATE "C" AS key,
               count(*) FILTER (WHERE final) AS requests,
               count(*) FILTER (WHERE final AND outcome = 'completed') AS completed,
               count(*) FILTER (WHERE final AND cold) AS cold,
               count(*) FILTER (WHERE NOT final) AS failed_attempts,
               coalesce(sum(prompt_tokens) FILTER (WHERE final), 0)::bigint AS prompt_tokens,
               coalesce(sum(cached_tokens) FILTER (WHERE final), 0)::bigint AS cached_tokens,
               coalesce(sum(completion_tokens) FILTER (WHERE final), 0)::bigint AS completion_tokens
          FROM usage_event e
         WHERE received_at >= to_timestamp($1) AND received_at < to_timestamp($2)
           AND ($3::text IS NULL OR workspace = $3) AND ($4::text IS NULL OR variant = $4)
           AND ($5::text IS NULL OR key = $5)
           AND NOT EXISTS (SELECT FROM usage_event c WHERE c.request_id = e.request_id AND c.attempt = e.attempt
                              AND c.revision > e.revision AND c.revision > 0)
         GROUP BY 1, 2, 3, 4) AS sums
     WHERE (start, workspace, variant, key) > ($10, $11 COLLATE "C", $12 COLLATE "C", $13 COLLATE "C")
     ORDER BY start, workspace, variant, key LIMIT $14
"""
_BEFORE_ALL: Final = UsageGroup(start=-1.0)


async def sum_usage(
    database: Database,
    workspace: str,
    *,
    since: float,
    until: float,
    by: Collection[Split] = (),
    variant: str | None = None,
    key: str | None = None,
    after: UsageGroup | None = None,
    limit: int = 1000,
) -> tuple[UsageSum, ...]:
    """What a workspace used by requests received in [since, until), split by `by`, in the order of the groups.

    At most `limit` sums, from the group behind `after` (the last one of the page before) on. Raises `ValueError` if
    both hours and days are asked for.
    """
    return await all_usage_sums(
        database,
        workspace=workspace,
        since=since,
        until=until,
        by=by,
        variant=variant,
        key=key,
        after=after,
        limit=limit,
    )


async def all_usage_sums(
    database: Database,
    *,
    since: float,
    until: float,
    by: Collection[Split] = (),
    workspace: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    after: UsageGroup | None = None,
    limit: int = 1000,
) -> tuple[UsageSum, ...]:  # cross-tenant: for operators
    """The same over all workspaces, or one of them."""
    if "hour" in by and "day" in by:
        raise ValueError("sums are split by hour or by day, not by both")
    unit = "hour" if "hour" in by else "day" if "day" in by else ""
    behind = after or _BEFORE_ALL
    rows = await database.fetch(
        _SUMS,
        max(since, behind.start) if unit else since,  # groups before the cursor's needn't be summed again
        until,
        workspace,
        variant,
        key,
        unit,
        "workspace" in by,
        "variant" in by,
        "key" in by,
        behind.start,
        behind.workspace,
        behind.variant,
        behind.key,
        limit,
    )
    return tuple(_sum(row) for row in rows)


def _sum(row: Record) -> UsageSum:
    group = UsageGroup(start=row["start"], workspace=row["workspace"], variant=row["variant"], key=row["key"])
    return UsageSum(
        group=group,
        requests=row["requests"],
        completed=row["completed"],
        cold=row["cold"],
        failed_attempts=row["failed_attempts"],
        prompt_tokens=row["prompt_tokens"],
        cached_tokens=row["cached_tokens"],
        completion_tokens=row["completion_tokens"],
    )
