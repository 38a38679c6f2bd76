"""Traces and log: one trace and one line for each request, with the same ids as its row in the ledger.

Spans are made by OpenTelemetry's SDK and leave the process only if an OTLP endpoint is configured; without one they
are not even recorded, but trace ids are there. What is in a request's trace is in `account`. No span, attribute or log
line carries what was asked or answered.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Final

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Span, format_trace_id, set_span_in_context

_NANO: Final = 1_000_000_000


def configure_logging(level: str) -> None:
    """One JSON object a line on standard output, from `level` on; for the whole process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )


class Telemetry:
    """Makes traces; owns its exporter."""

    def __init__(
        self, service: str, instance: str, otlp_endpoint: str = "", *, processor: SpanProcessor | None = None
    ) -> None:
        """`otlp_endpoint`: base URL of an OTLP/HTTP collector, or empty; `processor`: another way for spans to go."""
        if otlp_endpoint:
            processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{otlp_endpoint.rstrip('/')}/v1/traces"))
        self._provider = TracerProvider(
            sampler=ALWAYS_OFF if processor is None else ALWAYS_ON,
            resource=Resource({"service.name": service, "service.instance.id": instance}),
            shutdown_on_exit=False,
        )
        if processor is not None:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("greenroom")

    def begin(self, name: str, at: float) -> Span:
        """A new trace's root, begun at `at` (seconds since the epoch)."""
        return self._tracer.start_span(name, start_time=int(at * _NANO))

    def part(self, parent: Span, name: str, start: float, end: float, attributes: Mapping[str, int | str]) -> Span:
        """A finished span under another."""
        span = self._tracer.start_span(
            name, context=set_span_in_context(parent), start_time=int(start * _NANO), attributes=attributes
        )
        span.end(int(max(start, end) * _NANO))
        return span

    def end(self, root: Span, at: float, attributes: Mapping[str, int | str | bool]) -> None:
        """The trace is over."""
        root.set_attributes(attributes)
        root.end(int(at * _NANO))

    def close(self) -> None:
        """Send what is left; blocks for a few seconds at most."""
        self._provider.shutdown()


def trace_id(span: Span) -> str:
    """32 hex digits."""
    return format_trace_id(span.get_span_context().trace_id)
