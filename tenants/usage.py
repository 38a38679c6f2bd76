"""The ledger's rows as frozen structs, and the one enum of how a request can end. Pure data.

Tokens are the engine's own numbers. Durations are microseconds, as integers; there are no floats in the ledger.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType
from uuid import UUID

from msgspec import Struct

from tenants.model import KeyId, WorkspaceName

RequestId = NewType("RequestId", UUID)  # UUIDv7; its text form is the X-Request-Id and the engine's request id


class Outcome(StrEnum):
    """How an attempt ended: ledger column, metric label and log field alike."""

    COMPLETED = "completed"
    """The engine finished and the client was sent all of it."""
    CLIENT_GONE = "client_gone"
    """The client left before the end."""
    ENGINE_REFUSED = "engine_refused"
    """The engine answered with a client error (4xx), passed on."""
    ENGINE_FAILED = "engine_failed"
    """The engine died or answered with an error of its own."""
    LOAD_FAILED = "load_failed"
    """No engine could be started."""
    HOLD_EXPIRED = "hold_expired"
    """No engine became free in time."""
    OVERLOADED = "overloaded"
    """The queue was full."""
    DRAINED = "drained"
    """The gateway stopped before the request was done."""
    GATEWAY_LOST = "gateway_lost"
    """The gateway died; closed by the reaper."""


class Source(StrEnum):
    """Where an event's token numbers come from."""

    STREAM = "stream"
    """The last usage read from the engine's response."""
    BOOK = "book"
    """The engine book."""
    NONE = "none"
    """Nothing reached an engine, or the engine died with it: all zero."""


class Tokens(Struct, frozen=True):
    """Token counts of an attempt, as the engine counted them."""

    prompt: int = 0
    cached: int = 0
    """Of `prompt`, those that the engine had cached."""
    completion: int = 0


class UsageOpen(Struct, frozen=True, kw_only=True):
    """An accepted request, durable before its client sees a byte."""

    request_id: RequestId
    attempt: int
    """1, 2, …"""
    workspace: WorkspaceName
    key: KeyId
    variant: str
    model: str
    endpoint: str
    """`chat` or `completions`."""
    stream: bool
    sequences: int
    """`n` × prompts: how many lines the engine books will have for it, and the slots it takes."""
    gateway: str
    """Instance id of the gateway process that answers for it."""
    received_at: float
    trace_id: str
    retry_count: int = 0
    """What the client said in `x-stainless-retry-count`; a hint."""


class UsageClose(Struct, frozen=True, kw_only=True):
    """How an attempt ended, as the gateway saw it.

    `source is None` means that tokens were used but the gateway can't know how many (the client of a request that
    wasn't streamed left): the reaper will take them from the engine book.
    """

    request_id: RequestId
    attempt: int
    outcome: Outcome
    final: bool
    source: Source | None
    tokens: Tokens
    ended_at: float
    engine: str | None = None
    cold: bool = False
    """Held for the start of an engine."""
    queued_us: int = 0
    """From admission until a slot was had (holds included)."""
    held_us: int = 0
    """Of `queued_us`, the part in which no engine of the pool was ready."""
    first_token_us: int | None = None
    """From receipt to the first byte of content sent on."""
    duration_us: int = 0
    """From receipt to the end."""
    detail: str | None = None
    """Why, for operators; never content."""


class BookTotals(Struct, frozen=True):
    """What the engine books have of one request: the sum over its lines."""

    tokens: Tokens
    lines: int
    engine: str
    finished_at: float


class UsageGroup(Struct, frozen=True, order=True, kw_only=True):
    """What a sum is over; a part that sums aren't split by is empty."""

    start: float = 0.0
    """Beginning of the hour or day (UTC), in seconds since the epoch."""
    workspace: str = ""
    variant: str = ""
    key: str = ""


class UsageSum(Struct, frozen=True, kw_only=True):
    """What a group used: requests by their final attempt, each attempt by its highest revision.

    Tokens are those of final attempts; failed ones cost their workspace nothing.
    """

    group: UsageGroup
    requests: int
    completed: int
    cold: int
    """Requests that held for the start of an engine."""
    failed_attempts: int
    """Attempts that were followed by another."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
