"""SQL of the tables `fleet_snapshot` and `demand_report`: the exchange as it goes while Valkey is away."""

from __future__ import annotations

from typing import Final

import msgspec

from engines.model import Demand, Fleet, GatewayId
from engines.queries.database import Database, as_json

FLEET_CHANNEL: Final = "greenroom_fleet"
DEMAND_CHANNEL: Final = "greenroom_demand"


async def put_fleet(database: Database, fleet: Fleet) -> bool:
    """Store the fleet unless a newer one is there and notify `FLEET_CHANNEL` with "epoch.version"; was it stored?"""
    stored = await database.fetchval(
        """
        WITH stored AS (
            INSERT INTO fleet_snapshot AS old (epoch, version, body) VALUES ($1, $2, $3::text::jsonb)
            ON CONFLICT (only_one) DO UPDATE
            SET epoch = excluded.epoch, version = excluded.version, body = excluded.body
            WHERE (old.epoch, old.version) < (excluded.epoch, excluded.version)
            RETURNING epoch, version
        )
        SELECT pg_notify($4, epoch || '.' || version)::text IS NOT NULL FROM stored
        """,
        fleet.epoch,
        fleet.version,
        as_json(fleet),
        FLEET_CHANNEL,
    )
    return stored is not None


async def fleet(database: Database) -> Fleet | None:
    """The last fleet that was stored; `None` before the first."""
    body = await database.fetchval("SELECT body::text FROM fleet_snapshot")
    return msgspec.json.decode(body, type=Fleet) if body is not None else None


async def put_demand(database: Database, demand: Demand) -> None:
    """Store a gateway's report over its last one and notify `DEMAND_CHANNEL` with the gateway's id."""
    await database.execute(
        """
        WITH stored AS (
            INSERT INTO demand_report AS old (gateway, at, body)
            VALUES ($1::uuid, to_timestamp($2::float8), $3::text::jsonb)
            ON CONFLICT (gateway) DO UPDATE SET at = excluded.at, body = excluded.body
            WHERE old.at <= excluded.at
            RETURNING gateway
        )
        SELECT pg_notify($4, gateway::text) FROM stored
        """,
        demand.gateway,
        demand.at,
        as_json(demand),
        DEMAND_CHANNEL,
    )


async def demand(database: Database, gateway: GatewayId) -> Demand | None:
    """A gateway's last stored report."""
    body = await database.fetchval("SELECT body::text FROM demand_report WHERE gateway = $1::uuid", gateway)
    return msgspec.json.decode(body, type=Demand) if body is not None else None


async def demands_since(database: Database, at: float) -> tuple[Demand, ...]:
    """Every gateway's last stored report if it was made at `at` or later."""
    rows = await database.fetch("SELECT body::text FROM demand_report WHERE at >= to_timestamp($1::float8)", at)
    return tuple(msgspec.json.decode(row["body"], type=Demand) for row in rows)


async def remove_demands_before(database: Database, at: float) -> int:
    """Forget reports of gateways that are long gone; how many there were."""
    rows = await database.fetch("DELETE FROM demand_report WHERE at < to_timestamp($1::float8) RETURNING 1", at)
    return len(rows)
