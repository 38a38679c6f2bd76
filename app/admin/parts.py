"""What the admin API's routes need, built in `wiring` and given to every route as the dependency `parts`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
from litestar.di import NamedDependency
from litestar.params import SkipValidation
from msgspec import Struct

from engines.logs import EngineLogs
from engines.model import Device, Fleet
from tenants.auth import Authenticator


class AdminParts(Struct, frozen=True, kw_only=True):
    """The admin API's surroundings; owns none of them."""

    pool: asyncpg.Pool[Any]
    authenticator: Authenticator
    pepper: bytes
    """Keys the HMAC of new keys."""
    fleet: Callable[[], Fleet | None]
    """The last fleet that this gateway heard of."""
    expected_devices: tuple[Device, ...] = ()
    """What can be placed on as far as the settings say, for the time before a controller has published a fleet."""
    max_engines_per_pool: int = 4
    models_path: Path
    logs: EngineLogs
    clock: Callable[[], float] = time.time
    random: Callable[[int], bytes] = secrets.token_bytes

    @property
    def devices(self) -> tuple[Device, ...]:
        """What engines can be placed on, as well as it is known here."""
        fleet = self.fleet()
        return fleet.devices if fleet is not None and fleet.devices else self.expected_devices


Parts = NamedDependency[SkipValidation[AdminParts]]
"""How a route asks for the dependency `parts`."""
