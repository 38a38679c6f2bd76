"""All SQL of `engines`: `leadership`, `lives` of engines, `exchange` of fleet and demand, `catalog` of variants.

Functions take an asyncpg connection or pool (`Database`); each is one statement, so each is atomic by itself. Structs
travel as JSON text cast in SQL, so that it doesn't matter whether a pool has codecs. Times are seconds since the epoch.

What the controller writes is guarded by its epoch: the statement locks the `installation` row for sharing, so a later
controller that raises the epoch waits for it, and from then on the old one's writes touch nothing and raise
`LeadershipLost`.
"""

from __future__ import annotations

from engines.queries.catalog import (
    CATALOG_CHANNEL,
    ModelRecord,
    all_have_any,
    all_variants,
    create_model,
    create_variant,
    delete_model,
    delete_variant,
    digest_is_named,
    lock_catalog,
    model_record,
    model_records,
    notify_catalog,
    send_command,
    update_variant,
    variant,
    variants,
)
from engines.queries.database import Connection, Database
from engines.queries.exchange import (
    DEMAND_CHANNEL,
    FLEET_CHANNEL,
    demand,
    demands_since,
    fleet,
    put_demand,
    put_fleet,
    remove_demands_before,
)
from engines.queries.leadership import Installation, installation, ping, raise_epoch, try_leadership
from engines.queries.lives import (
    EngineRecord,
    Interval,
    change_engine,
    engine_intervals,
    engine_record,
    engine_records,
    live_engines,
    place_engine,
    start_times,
)

__all__ = [
    "CATALOG_CHANNEL",
    "DEMAND_CHANNEL",
    "FLEET_CHANNEL",
    "Connection",
    "Database",
    "EngineRecord",
    "Installation",
    "Interval",
    "ModelRecord",
    "all_have_any",
    "all_variants",
    "change_engine",
    "create_model",
    "create_variant",
    "delete_model",
    "delete_variant",
    "demand",
    "demands_since",
    "digest_is_named",
    "engine_intervals",
    "engine_record",
    "engine_records",
    "fleet",
    "installation",
    "live_engines",
    "lock_catalog",
    "model_record",
    "model_records",
    "notify_catalog",
    "ping",
    "place_engine",
    "put_demand",
    "put_fleet",
    "raise_epoch",
    "remove_demands_before",
    "send_command",
    "start_times",
    "try_leadership",
    "update_variant",
    "variant",
    "variants",
]
