"""Builders for the deciding modules' tests: models, variants, engines, reports."""

from __future__ import annotations

import uuid
from typing import Any

from msgspec.structs import replace

from engines.model import (
    Demand,
    Device,
    DeviceId,
    Engine,
    EngineId,
    EngineState,
    GatewayId,
    Model,
    ModelDigest,
    NodeId,
    PoolDemand,
    PoolId,
    RuntimeArguments,
    Scaling,
    Variant,
)

GB = 10**9
NODE = NodeId("here")
MEMORY = DeviceId("here/mem")
EPOCH = 1


def model(letter: str = "a", **fields: Any) -> Model:
    return replace(
        Model(
            name=f"model-{letter}",
            digest=ModelDigest(letter * 64),
            architecture="LlamaForCausalLM",
            weights_bytes=270_000_000,
            parameters=135_000_000,
            max_model_len=8192,
            kv_bytes_per_token=23_040,
            dtype="bfloat16",
            source="a test",
        ),
        **fields,
    )


def variant(
    letter: str = "a", *, name: str = "bot", workspace: str = "acme", slots: int = 16, **scaling: Any
) -> Variant:
    return Variant(
        workspace=workspace,
        name=name,
        model=model(letter),
        scaling=Scaling(**scaling),
        arguments=RuntimeArguments(max_num_seqs=slots),
    )


def engine(number: int, of: Variant, state: EngineState = EngineState.READY, **fields: Any) -> Engine:
    """An engine of the variant's pool, placed at 0 and ready since 2 unless said otherwise; it takes 1 GB."""
    return replace(
        Engine(
            id=engine_id(number),
            pool=of.spec.pool,
            spec=of.spec,
            state=state,
            since=2.0,
            node=NODE,
            device=MEMORY,
            memory_bytes=GB,
            epoch=EPOCH,
            created_at=0.0,
            address=f"/run/{number}/s",
            pid=1000 + number,
            pid_start=number,
            ready_at=2.0,
        ),
        **fields,
    )


def engine_id(number: int) -> EngineId:
    return EngineId(str(uuid.UUID(int=number)))


def gateway(number: int) -> GatewayId:
    return GatewayId(str(uuid.UUID(int=1000 + number)))


def device(size: int = 4 * GB, name: DeviceId = MEMORY) -> Device:
    return Device(id=name, node=NODE, memory_bytes=size)


def report(
    number: int = 1,
    *,
    at: float = 0.0,
    epoch: int = EPOCH,
    version: int = 0,
    engines: dict[EngineId, int] | None = None,
    leaving: bool = False,
    pools: dict[PoolId, PoolDemand] | None = None,
    **pool_demand: Any,
) -> Demand:
    """A gateway's report; `pool=…, waiting=…` is short for one pool."""
    pools = dict(pools or {})
    if pool_demand:
        pool = pool_demand.pop("pool")
        pools[pool] = PoolDemand(**pool_demand)
    return Demand(
        gateway=gateway(number),
        at=at,
        fleet_epoch=epoch,
        fleet_version=version,
        pools=pools,
        engines=engines or {},
        leaving=leaving,
    )
