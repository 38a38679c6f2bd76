"""What is told of an accepted request at its end: one log line, one trace and the metrics, from the row that closes it.

    POST /v1/chat/completions     from receipt to the end
    ├── queue                     waiting for an engine or a slot
    │   └── cold_start            if it held for one: the engine's start, with a span for each phase
    ├── engine                    from sending to an engine until it was done
    └── settle                    until the closing row was handed to the ledger

The same ids and numbers are in the ledger. Nothing that a client wrote is told, but its names for things that exist.
"""

from __future__ import annotations

import structlog
from opentelemetry.trace import Span

from app.metrics import Metrics
from app.telemetry import Telemetry
from engines.model import Engine
from tenants.usage import UsageClose, UsageOpen

Facts = dict[str, int | str | bool]

log = structlog.get_logger()


def tell(
    telemetry: Telemetry,
    metrics: Metrics,
    span: Span,
    *,
    opened: UsageOpen,
    closed: UsageClose,
    status: int,
    engine: Engine | None,
) -> None:
    """Tell of a request that is over.

    `status`: what the client was answered, 0 if nothing; `engine`: the last that it was sent to.
    """
    facts = _facts(opened, closed, status)
    log.info("request", trace_id=opened.trace_id, key=opened.key, detail=closed.detail, **facts)
    metrics.ended(opened.workspace, opened.variant, closed.outcome, closed.tokens)
    metrics.timed(queued_us=closed.queued_us, first_token_us=closed.first_token_us, cold=closed.cold)
    if span.is_recording():
        _parts(telemetry, span, opened, closed, engine)
    telemetry.end(span, max(closed.ended_at, opened.received_at), facts)


def _facts(opened: UsageOpen, closed: UsageClose, status: int) -> Facts:
    return {
        "request_id": str(opened.request_id),
        "workspace": opened.workspace,
        "variant": opened.variant,
        "endpoint": opened.endpoint,
        "stream": opened.stream,
        "attempt": closed.attempt,
        "outcome": str(closed.outcome),
        "status": status,
        "engine": closed.engine or "",
        "cold": closed.cold,
        "prompt_tokens": closed.tokens.prompt,
        "cached_tokens": closed.tokens.cached,
        "completion_tokens": closed.tokens.completion,
        "source": str(closed.source or "pending"),
        "queued_us": closed.queued_us,
        "held_us": closed.held_us,
        "first_token_us": closed.first_token_us or 0,
        "duration_us": closed.duration_us,
    }


def _parts(telemetry: Telemetry, span: Span, opened: UsageOpen, closed: UsageClose, engine: Engine | None) -> None:
    ended = opened.received_at + closed.duration_us / 1e6
    dispatched = opened.received_at + closed.queued_us / 1e6
    queue = telemetry.part(span, "queue", opened.received_at, dispatched, {})
    if closed.cold and engine is not None and engine.ready_at is not None:
        _cold_start(telemetry, queue, engine, engine.ready_at)
    if closed.engine is not None:
        telemetry.part(span, "engine", dispatched, ended, {"engine": closed.engine})
    telemetry.part(span, "settle", ended, closed.ended_at, {})


def _cold_start(telemetry: Telemetry, queue: Span, engine: Engine, ready_at: float) -> None:
    """The start that it held for, as the controller saw it; the phases follow each other and end when it was ready."""
    at = ready_at - sum(engine.phases_us.values()) / 1e6
    start = telemetry.part(queue, "cold_start", at, ready_at, {"engine": engine.id})
    for phase, took_us in engine.phases_us.items():
        telemetry.part(start, phase, at, at + took_us / 1e6, {})
        at += took_us / 1e6
