"""`/livez`: the process answers. `/readyz`: it may be sent requests. `/metrics`, for operators."""

from __future__ import annotations

from typing import Any

from litestar import Response, get

from app import metrics
from app.parts import GatewayParts


def missing(parts: GatewayParts) -> tuple[str, ...]:
    """What keeps this gateway from being ready; empty when it is."""
    reasons = {
        "draining": parts.drain.began,
        "no fleet yet": parts.admission.fleet is None,
        "the ledger can't be written": not parts.ledger.available,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def routes(parts: GatewayParts) -> list[Any]:
    """Both probes; they say nothing about tenants."""

    @get("/livez", media_type="text/plain", sync_to_thread=False)
    def livez() -> str:
        return "ok"

    @get("/readyz", media_type="text/plain", sync_to_thread=False)
    def readyz() -> Response[str]:
        reasons = missing(parts)
        return Response(", ".join(reasons) or "ok", status_code=503 if reasons else 200, media_type="text/plain")

    return [livez, readyz]


def metrics_route(parts: GatewayParts) -> Any:
    """What Prometheus reads."""

    @get("/metrics", sync_to_thread=False, include_in_schema=False)
    def show() -> Response[bytes]:
        return Response(parts.metrics.text(), media_type=metrics.CONTENT_TYPE.decode())

    return show
