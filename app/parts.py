"""What the routes of a gateway need: built in `wiring`, passed to every route; routes own none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.drain import Drain
from app.metrics import Metrics
from app.settings import GatewaySettings
from app.telemetry import Telemetry
from engines.admission import Admission
from engines.catalog import Catalog
from engines.client import EngineClient
from tenants.auth import Authenticator
from tenants.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class GatewayParts:
    """One gateway's surroundings."""

    gateway: str
    """Instance id of this process."""
    settings: GatewaySettings
    authenticator: Authenticator
    catalog: Catalog
    admission: Admission
    client: EngineClient
    ledger: Ledger
    drain: Drain
    telemetry: Telemetry
    metrics: Metrics
    clock: Callable[[], float]
    """Seconds since the epoch."""
