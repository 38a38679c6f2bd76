"""Words of the hosting side as frozen structs: models, variants, engine specs, engines, devices, the fleet, demand.

Pure data: no I/O, no clock. Times are seconds since the epoch (`float`) unless a name says otherwise; memory is bytes;
durations in names carry their unit (`_s`, `_us`). `workspace` is an opaque name; what one may do is `tenants`' matter.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Final, Literal, NewType

import msgspec
from msgspec import Meta, Struct

EngineId = NewType("EngineId", str)  # UUIDv7, canonical text form
PoolId = NewType("PoolId", str)  # 16 hex digits, `EngineSpec.pool`
ModelDigest = NewType("ModelDigest", str)  # 64 hex digits, over the model's files
NodeId = NewType("NodeId", str)
DeviceId = NewType("DeviceId", str)  # unique over the installation: "<node>/mem", "<node>/gpu0"
GatewayId = NewType("GatewayId", str)  # UUIDv7 of one gateway process

SHARED: Final = "shared"
HOST_MEMORY: Final = "mem"

NAME_PATTERN: Final = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$(?!\n)"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""A name that people choose: lower-case letters, digits, `.`, `_`, `-`; 1 to 64 characters; safe in URLs and logs."""

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]


class RuntimeArguments(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator may set of vLLM, as typed fields; there is no free text (`--trust-remote-code` can't be said).

    The defaults favour a quick start over peak throughput: an explicit KV size skips memory profiling, eager mode
    skips compilation, and few batched tokens shorten the warm-up.
    """

    max_model_len: Annotated[int, Meta(ge=16, le=10_000_000)] = 2048
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 16
    max_num_batched_tokens: Annotated[int, Meta(ge=16, le=1_000_000)] = 512
    kv_cache_bytes: Annotated[int, Meta(ge=1 << 20)] = 256 << 20
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    enforce_eager: bool = True
    threads: Annotated[int, Meta(ge=1, le=256)] = 1


class EngineSpec(Struct, frozen=True, kw_only=True):
    """What an engine is started with; engines of equal spec form a pool."""

    model_digest: ModelDigest
    arguments: RuntimeArguments = RuntimeArguments()
    isolation: str = SHARED
    """`shared`, or the workspace that has engines of its own."""

    @property
    def pool(self) -> PoolId:
        """The pool's id: the first 16 hex digits of SHA-256 over the spec's JSON with sorted keys."""
        return PoolId(hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16])

    @property
    def slots(self) -> int:
        """How many sequences an engine of this spec runs at once."""
        return self.arguments.max_num_seqs


class Footprint(Struct, frozen=True, kw_only=True):
    """Device memory that an engine needs, in bytes."""

    weights: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.overhead


class Model(Struct, frozen=True, kw_only=True):
    """Packaged weights in the model store: `<models>/<digest>/` holds the files, this is the manifest."""

    name: Name
    digest: ModelDigest
    architecture: str
    weights_bytes: int
    parameters: int
    max_model_len: int
    """The longest context that the model's own config allows, in tokens."""
    kv_bytes_per_token: int
    """Keys and values of all layers for one token at the weights' dtype."""
    dtype: str
    source: str
    """Where it came from, as the operator named it; for people."""
    files: tuple[ModelFile, ...] = ()


class ModelFile(Struct, frozen=True):
    """One file of a model: path relative to the model's folder, size, SHA-256."""

    path: str
    size: int
    sha256: str


class RequestDefaults(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a variant adds to a request that does not say it itself."""

    system_prompt: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None


class Scaling(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a variant's engines come and go. Settings are per variant, decisions per pool."""

    idle_timeout_s: Annotated[float, Meta(ge=0, le=86_400 * 30)] = 600.0
    provisioned: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Provisioned concurrency: requests that can always start at once."""
    max_concurrency: PositiveInt | None = None
    """Caps the variant's own admission; `None`: no cap."""


class Variant(Struct, frozen=True, kw_only=True):
    """What a workspace names in `"model"`."""

    workspace: str
    name: Name
    model: Model
    defaults: RequestDefaults = RequestDefaults()
    scaling: Scaling = Scaling()
    arguments: RuntimeArguments = RuntimeArguments()
    dedicated: bool = False
    created_at: float = 0.0

    @property
    def spec(self) -> EngineSpec:
        """The engine spec that serves this variant."""
        return EngineSpec(
            model_digest=self.model.digest,
            arguments=self.arguments,
            isolation=self.workspace if self.dedicated else SHARED,
        )


class EngineState(StrEnum):
    """Where an engine is in its life; the table of changes is in `lifecycle`."""

    PLACED = "placed"
    STARTING = "starting"
    READY = "ready"
    ASLEEP = "asleep"
    WAKING = "waking"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"
    STOPPED = "stopped"


class Device(Struct, frozen=True, kw_only=True):
    """A GPU, or the host's memory where there is none."""

    id: DeviceId
    node: NodeId
    memory_bytes: int
    """What engines may reserve on it in all."""


class Engine(Struct, frozen=True, kw_only=True):
    """One running vLLM server: one replica of a pool, one process group."""

    id: EngineId
    pool: PoolId
    spec: EngineSpec
    state: EngineState
    since: float
    """When it entered `state`."""
    node: NodeId
    device: DeviceId
    memory_bytes: int
    """Reserved on the device while the state is one of `lifecycle.HOLDS_MEMORY`."""
    epoch: int
    """Of the controller that placed it."""
    created_at: float
    address: str | None = None
    """Path of its Unix socket; known from STARTING on."""
    pid: int | None = None
    """Leader of its process group and session."""
    pid_start: int | None = None
    """Start time of the leader in clock ticks since boot (`/proc/PID/stat` field 22): tells a reused pid apart."""
    caused_by: str | None = None
    """`workspace/variant` whose request or promise made it start."""
    ready_at: float | None = None
    phases_us: dict[str, int] = {}
    """Microseconds of start-up by phase: fork, config, weights, init, listening."""
    failure: str | None = None
    """Why it failed, for operators."""

    @property
    def slots(self) -> int:
        """How many sequences it runs at once."""
        return self.spec.slots


class PoolFailure(Struct, frozen=True, kw_only=True):
    """A pool whose last start failed; no new start before `retry_at`."""

    reason: str
    """A hint fit for callers: no paths, no log lines."""
    failures: int
    """Starts that failed in a row."""
    retry_at: float


class PoolStatus(Struct, frozen=True, kw_only=True):
    """What gateways need to know of a pool beyond its engines."""

    pool: PoolId
    desired: int
    start_s: float
    """How long a start of this pool is expected to take, from the last one that succeeded."""
    failure: PoolFailure | None = None
    blocked: str | None = None
    """Why no engine can be placed just now, for people; `None` while nothing is in the way."""


class Fleet(Struct, frozen=True, kw_only=True):
    """The immutable snapshot that the controller publishes; a higher `(epoch, version)` replaces a lower one."""

    epoch: int
    version: int
    at: float
    engines: tuple[Engine, ...] = ()
    pools: tuple[PoolStatus, ...] = ()
    devices: tuple[Device, ...] = ()


class PoolDemand(Struct, frozen=True, kw_only=True):
    """What one gateway has for one pool, in slots and requests."""

    running: int = 0
    """Slots in use by requests at engines."""
    waiting: int = 0
    """Slots wanted by holds."""
    arrivals: int = 0
    """Requests that arrived since this gateway started; only ever grows."""
    last_used_at: float = 0.0
    """When a request of this pool last arrived or ended; 0 if never."""
    idle_timeout_s: float = 0.0
    """The longest keep-alive among the variants used through this gateway."""
    caused_by: str | None = None
    """`workspace/variant` of the oldest hold."""


class Demand(Struct, frozen=True, kw_only=True):
    """One gateway's report, also its acknowledgement of a fleet."""

    gateway: GatewayId
    at: float
    fleet_epoch: int
    fleet_version: int
    pools: dict[PoolId, PoolDemand] = {}
    engines: dict[EngineId, int] = {}
    """Requests in flight by engine, only those above zero."""
    leaving: bool = False
    """The gateway drains: it will send nothing more once `engines` is empty."""
