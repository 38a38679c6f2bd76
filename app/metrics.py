"""Every metric of a gateway: all names are here. One registry a process; `/metrics` shows it.

Labels are bounded: outcomes, and what operators themselves have named. A workspace's name is one; a key never is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tenants.usage import Outcome, Tokens

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0, 540.0)


class Metrics:
    """A gateway's instruments."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("workspace", "variant")
        self._requests = Counter(
            "greenroom_requests",
            "Accepted requests by how they ended.",
            (*labels, "outcome"),
            registry=registry,
        )
        self._refused = Counter(
            "greenroom_refused", "Requests that were not accepted, by status.", ("status",), registry=registry
        )
        self._tokens = Counter(
            "greenroom_tokens", "Tokens as engines count them.", (*labels, "kind"), registry=registry
        )
        self._first_token = Histogram(
            "greenroom_first_token_seconds",
            "From receipt to the first byte of the answer.",
            ("cold",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Histogram("greenroom_queued_seconds", "Waiting for a slot.", buckets=_SECONDS, registry=registry)
        self._late = Counter(
            "greenroom_closes_late", "Answers that ended before their row was durable.", registry=registry
        )

    def watch(
        self,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        backlog: Callable[[], float],
        dropped: Callable[[], float],
    ) -> None:
        """Gauges that are read when somebody asks."""
        for name, what, read in (
            ("greenroom_requests_running", "Requests at engines.", running),
            ("greenroom_requests_waiting", "Requests that hold.", waiting),
            ("greenroom_ledger_backlog", "Closes that Postgres has not taken yet.", backlog),
            ("greenroom_ledger_dropped", "Closes given up, left to the reaper.", dropped),
        ):
            Gauge(name, what, registry=self._registry).set_function(read)

    def ended(self, workspace: str, variant: str, outcome: Outcome, tokens: Tokens) -> None:
        """An accepted request is over."""
        self._requests.labels(workspace, variant, outcome).inc()
        for kind, count in (("prompt", tokens.prompt), ("cached", tokens.cached), ("completion", tokens.completion)):
            if count:
                self._tokens.labels(workspace, variant, kind).inc(count)

    def timed(self, *, queued_us: int, first_token_us: int | None, cold: bool) -> None:
        """How long an accepted request waited."""
        self._queued.observe(queued_us / 1e6)
        if first_token_us is not None:
            self._first_token.labels(str(cold).lower()).observe(first_token_us / 1e6)

    def refused(self, status: int) -> None:
        """A request was not accepted."""
        self._refused.labels(str(status)).inc()

    def closed_late(self) -> None:
        """A client was not kept waiting any longer for its row."""
        self._late.inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
