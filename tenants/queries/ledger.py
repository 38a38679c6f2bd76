"""SQL of `usage_open`, `usage_event` and `instance`: many rows a statement, each statement atomic by itself.

Everything here is cross-tenant: a commit carries the rows of whoever had requests just then, each with its workspace.

The rules that make any of it safe to say twice, late, or by two processes at once:

- `usage_open` has at most one row of a request, and one that was accepted has either that row or its final event:
  a failed attempt's event and the open row of the next attempt are written by one statement.
- A closing brings all columns itself, so it doesn't matter whether the open row is still there.
- Revision 0 of an attempt is written by whoever comes first. A second closing changes nothing, with one exception:
  an event that says `gateway_lost` is the reaper's word on a gateway that was silent for too long. If that gateway
  lived after all, what it says supersedes it as the next revision; numbers that the reaper had found in an engine book
  stay if the gateway has none.
- A closing locks (deletes) its open rows before it writes events, and the reaper skips locked rows: no dead-lock.
- Of a request's attempts, one has `final` in its highest revision. Where the reaper had closed an attempt as final that
  the gateway then calls failed, the next attempt's first event has revision 1, since the place of the first final
  event of the request (`usage_event_one_final`) is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final
from uuid import UUID

import msgspec
from asyncpg import Record
from msgspec import Struct

from tenants.model import KeyId, WorkspaceName
from tenants.queries.database import Connection, Database
from tenants.usage import RequestId, UsageClose, UsageOpen

Attempt = tuple[UUID, int]

_UNKNOWN_LEASE: Final = "interval '30 s'"
"""An open row whose gateway has no instance row counts as if the lease had ended so long after its receipt."""

_RECORD: Final = """
    request_id uuid, attempt smallint, workspace text, key text, variant text, model text, endpoint text,
    stream boolean, sequences integer, gateway uuid, received_at float8, trace_id text, retry_count numeric
"""
_OPEN_RECORD: Final = f"json_to_recordset($1::text::json) AS ({_RECORD})"
_OPEN_COLUMNS: Final = """
    request_id, attempt, workspace, key, variant, model, endpoint, stream, sequences, gateway, received_at, trace_id,
    retry_count
"""
_OPEN_VALUES: Final = """
    request_id, attempt, workspace, key, variant, model, endpoint, stream, sequences, gateway,
    to_timestamp(received_at), trace_id, least(greatest(retry_count, 0), 2147483647)::integer
"""


class Closing(Struct, frozen=True):
    """An attempt and how it ended: all that its event needs."""

    open: UsageOpen
    close: UsageClose

    @property
    def attempt(self) -> Attempt:
        """Its key in the ledger."""
        return self.open.request_id, self.open.attempt


class LeftOpen(Struct, frozen=True):
    """An open row that is the reaper's to close."""

    open: UsageOpen
    pending: UsageClose | None
    """What the gateway said, if only the tokens are missing; `None`: the gateway is dead."""
    pending_text: str | None
    """`pending` as stored: tells whether it has changed since."""
    silent_s: float
    """Since the end of the gateway's lease; negative while it lives."""


async def all_usage_open(database: Database, opens: Sequence[UsageOpen]) -> None:
    """Make open rows durable; those that are there already stay as they are."""
    await database.execute(
        f"""INSERT INTO usage_open ({_OPEN_COLUMNS}) SELECT {_OPEN_VALUES} FROM {_OPEN_RECORD}
            ON CONFLICT DO NOTHING""",  # noqa: S608
        _json(opens),
    )


async def all_usage_close(
    database: Database, closings: Sequence[Closing], opens: Sequence[UsageOpen] = ()
) -> set[Attempt]:
    """Write events, remove the open rows, and open the next attempt of those that aren't final; one commit.

    Other requests' `opens` can share it. Returns the attempts that are settled: written now or before. One that isn't
    met another closer in the middle of a commit; say it again. No request may come twice.
    """
    rows = await database.fetch(
        _CLOSE,
        _json([closing.open for closing in closings]),
        _json([closing.close for closing in closings]),
        _json(opens),
    )
    return {(row["request_id"], row["attempt"]) for row in rows}


async def all_usage_pending(database: Database, closings: Sequence[Closing]) -> None:
    """Leave attempts to the reaper, with everything about their end but the tokens."""
    await database.execute(
        f"""INSERT INTO usage_open ({_OPEN_COLUMNS}, pending)
            SELECT {_OPEN_VALUES}, pending::jsonb
              FROM ROWS FROM ({_OPEN_RECORD}, json_array_elements($2::text::json))
                   AS given({_OPEN_COLUMNS}, pending)
            ON CONFLICT (request_id, attempt) DO UPDATE SET pending = excluded.pending""",  # noqa: S608
        _json([closing.open for closing in closings]),
        _json([closing.close for closing in closings]),
    )


async def all_usage_withdraw(database: Database, attempts: Collection[Attempt]) -> None:
    """Remove open rows of requests that were refused in the end, as if they had never been."""
    await database.execute(
        """DELETE FROM usage_open USING unnest($1::uuid[], $2::smallint[]) AS given(request_id, attempt)
            WHERE usage_open.request_id = given.request_id AND usage_open.attempt = given.attempt""",
        [request for request, _ in attempts],
        [attempt for _, attempt in attempts],
    )


async def all_usage_of_gateway(database: Database, gateway: str) -> tuple[UsageOpen, ...]:
    """The open rows that a gateway answers for (those that are left to the reaper are not among them)."""
    rows = await database.fetch(f"{_SELECT_OPEN} WHERE gateway = $1 AND pending IS NULL", UUID(gateway))
    return tuple(_open(row) for row in rows)


async def all_usage_left_open(
    database: Database, *, grace_s: float, after: Attempt | None, limit: int
) -> tuple[LeftOpen, ...]:
    """Rows that wait for an engine book, and those of gateways whose lease ended more than `grace_s` ago.

    In order of their requests' ids (so of time), at most `limit`, from the one behind `after` on. The database's clock
    decides about leases, here as in `extend_lease`.
    """
    request, attempt = after or (UUID(int=0), 0)
    rows = await database.fetch(
        f"""SELECT * FROM (
                {_SELECT_OPEN} WHERE (request_id, attempt) > ($2, $3)
            ) AS row
             WHERE pending IS NOT NULL OR silent_s > $1 ORDER BY request_id, attempt LIMIT $4""",  # noqa: S608
        grace_s,
        request,
        attempt,
        limit,
    )
    return tuple(
        LeftOpen(
            _open(row),
            None if row["pending"] is None else msgspec.json.decode(row["pending"], type=UsageClose),
            row["pending"],
            row["silent_s"],
        )
        for row in rows
    )


async def all_usage_lock(connection: Connection, rows: Sequence[LeftOpen], *, grace_s: float) -> set[Attempt]:
    """Lock those rows that are still as they were read and still the reaper's, until the end of the transaction.

    Rows that another closer has are left out, so this never waits.
    """
    locked = await connection.fetch(
        f"""SELECT o.request_id, o.attempt
              FROM unnest($1::uuid[], $2::smallint[], $3::text[]) AS given(request_id, attempt, pending)
              JOIN usage_open o USING (request_id, attempt) LEFT JOIN instance i ON i.id = o.gateway
             WHERE o.pending IS NOT DISTINCT FROM given.pending::jsonb
               AND (o.pending IS NOT NULL
                    OR coalesce(i.lease_until, o.received_at + {_UNKNOWN_LEASE}) < now() - make_interval(secs => $4))
               FOR UPDATE OF o SKIP LOCKED""",  # noqa: S608
        [row.open.request_id for row in rows],
        [row.open.attempt for row in rows],
        [row.pending_text for row in rows],
        grace_s,
    )
    return {(row["request_id"], row["attempt"]) for row in locked}


async def extend_lease(database: Database, instance: str, *, kind: str, pid: int, lease_s: float) -> None:
    """Say that a process lives and answers for its open rows until `lease_s` from now, by the database's clock."""
    await database.execute(
        """INSERT INTO instance (id, kind, pid, lease_until) VALUES ($1, $2, $3, now() + make_interval(secs => $4))
           ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until""",
        UUID(instance),
        kind,
        pid,
        lease_s,
    )


async def remove_instance(database: Database, instance: str) -> bool:
    """Take a process off the list if nothing is open that only it could close; was that so?"""
    return bool(
        await database.fetchval(
            """WITH removed AS (
                   DELETE FROM instance WHERE id = $1
                      AND NOT EXISTS (SELECT FROM usage_open WHERE gateway = $1 AND pending IS NULL) RETURNING 1)
               SELECT EXISTS (SELECT FROM removed)""",
            UUID(instance),
        )
    )


async def remove_dead_instances(database: Database, *, silent_s: float) -> None:
    """Forget processes that were silent for so long and have no open row left."""
    await database.execute(
        """DELETE FROM instance i WHERE lease_until < now() - make_interval(secs => $1)
              AND NOT EXISTS (SELECT FROM usage_open WHERE gateway = i.id)""",
        silent_s,
    )


_SELECT_OPEN: Final = f"""
    SELECT request_id, attempt, workspace, key, variant, model, endpoint, stream, sequences, gateway::text,
           extract(epoch FROM received_at)::float8 AS received_at, trace_id, retry_count, pending::text,
           extract(epoch FROM now() - coalesce((SELECT lease_until FROM instance WHERE id = gateway),
                                               received_at + {_UNKNOWN_LEASE}))::float8 AS silent_s
      FROM usage_open
"""  # noqa: S608

_CLOSE: Final = f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM ROWS FROM (
            {_OPEN_RECORD},
            json_to_recordset($2::text::json) AS (
                outcome text, final boolean, source text, tokens json, ended_at float8, engine uuid, cold boolean,
                queued_us bigint, held_us bigint, first_token_us bigint, duration_us bigint, detail text))
    ), removed AS (
        DELETE FROM usage_open o USING given g WHERE o.request_id = g.request_id AND o.attempt = g.attempt RETURNING 1
    ), known AS MATERIALIZED (
        SELECT g.*, last.revision AS last_revision, last.outcome AS last_outcome, last.source AS last_source,
               last.prompt_tokens, last.cached_tokens, last.completion_tokens,
               coalesce(others.first_final, false) AS first_final, coalesce(others.ended, false) AS ended
          FROM (SELECT count(*) AS locked FROM removed) AS all_locked  -- before any event is looked at or written
          CROSS JOIN given g
          LEFT JOIN LATERAL (
              SELECT * FROM usage_event e WHERE e.request_id = g.request_id AND e.attempt = g.attempt
               ORDER BY e.revision DESC LIMIT 1) AS last ON true
          LEFT JOIN LATERAL (
              SELECT bool_or(e.final AND e.revision = 0) AS first_final,
                     bool_or(e.final AND NOT EXISTS (
                         SELECT FROM usage_event n WHERE n.request_id = e.request_id AND n.attempt = e.attempt
                            AND n.revision > e.revision)) AS ended
                FROM usage_event e WHERE e.request_id = g.request_id AND e.attempt <> g.attempt) AS others ON true
         WHERE all_locked.locked >= 0
    ), due AS (
        SELECT *, last_source IN ('stream', 'book') AND source = 'none' AS keep_tokens FROM known
         WHERE (last_revision IS NULL OR (last_outcome = 'gateway_lost' AND outcome <> 'gateway_lost'))
           AND NOT (final AND ended)
    ), written AS (
        INSERT INTO usage_event (
            request_id, attempt, revision, final, workspace, key, variant, model, endpoint, stream, outcome, source,
            prompt_tokens, cached_tokens, completion_tokens, engine, cold, received_at, ended_at, queued_us, held_us,
            first_token_us, duration_us, detail, trace_id, retry_count)
        SELECT request_id, attempt, coalesce(last_revision + 1, (final AND first_final)::integer), final,
               workspace, key, variant, model, endpoint, stream, outcome,
               CASE WHEN keep_tokens THEN last_source ELSE source END,
               CASE WHEN keep_tokens THEN prompt_tokens ELSE greatest((tokens->>'prompt')::bigint, 0) END,
               CASE WHEN keep_tokens THEN cached_tokens
                    ELSE least(greatest((tokens->>'cached')::bigint, 0), greatest((tokens->>'prompt')::bigint, 0)) END,
               CASE WHEN keep_tokens THEN completion_tokens ELSE greatest((tokens->>'completion')::bigint, 0) END,
               engine, cold, to_timestamp(received_at), to_timestamp(ended_at),
               greatest(queued_us, 0), greatest(held_us, 0),
               CASE WHEN first_token_us IS NOT NULL THEN greatest(first_token_us, 0) END, greatest(duration_us, 0),
               detail, trace_id, least(greatest(retry_count, 0), 2147483647)::integer
          FROM due
        ON CONFLICT DO NOTHING RETURNING request_id, attempt
    ), reopened AS (
        INSERT INTO usage_open ({_OPEN_COLUMNS})
        SELECT request_id, (attempt + 1)::smallint, workspace, key, variant, model, endpoint, stream, sequences,
               gateway, to_timestamp(received_at), trace_id, least(greatest(retry_count, 0), 2147483647)::integer
          FROM due JOIN written USING (request_id, attempt) WHERE NOT final
        ON CONFLICT DO NOTHING
    ), opened AS (
        INSERT INTO usage_open ({_OPEN_COLUMNS})
        SELECT {_OPEN_VALUES} FROM json_to_recordset($3::text::json) AS ({_RECORD}) ON CONFLICT DO NOTHING
    )
    SELECT request_id, attempt FROM written
    UNION ALL
    SELECT request_id, attempt FROM known WHERE (request_id, attempt) NOT IN (SELECT request_id, attempt FROM due)
"""  # noqa: S608


def _json(values: Sequence[object]) -> str:
    return msgspec.json.encode(values).decode()


def _open(row: Record) -> UsageOpen:
    return UsageOpen(
        request_id=RequestId(row["request_id"]),
        attempt=row["attempt"],
        workspace=WorkspaceName(row["workspace"]),
        key=KeyId(row["key"]),
        variant=row["variant"],
        model=row["model"],
        endpoint=row["endpoint"],
        stream=row["stream"],
        sequences=row["sequences"],
        gateway=row["gateway"],
        received_at=row["received_at"],
        trace_id=row["trace_id"],
        retry_count=row["retry_count"],
    )
