"""Every setting as one frozen tree, read once at the edge.

Sources, later ones win: defaults here, `greenroom.toml`, `GREENROOM_*` (nesting by `__`: `GREENROOM_ENGINE__START`),
command-line flags. An unknown name or a bad value is one precise line (`SettingsInvalid`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

PREFIX = "GREENROOM_"
Port = Annotated[int, Meta(ge=0, le=65_535)]
Seconds = Annotated[float, Meta(ge=0)]


class SettingsInvalid(Exception):
    """A setting that is unknown or has a bad value; the message is one line that names it."""


class GatewaySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: Port = 8000
    operator_host: str = "127.0.0.1"
    operator_port: Port = 8001
    """The first gateway's; the n-th has `operator_port + n`."""
    count: Annotated[int, Meta(ge=1, le=64)] = 1
    """How many gateways `greenroom up` starts."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 4 << 20
    body_timeout_s: Seconds = 30.0
    """For the whole request body to arrive."""
    hold_s: Seconds = 25.0
    """How long a request that isn't streamed waits for an engine or slot before it gets 503."""
    stream_hold_s: Seconds = 540.0
    """The same for a stream."""
    queue_length: Annotated[int, Meta(ge=1)] = 1000
    """Holds per pool and gateway; one more gets 503."""
    engine_read_s: Seconds = 300.0
    """Longest silence of an engine in the middle of a response."""
    drain_s: Seconds = 30.0
    """How long open requests may go on after SIGTERM."""


class ControllerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The deciding side."""

    tick_s: Annotated[float, Meta(gt=0, le=10)] = 0.25
    memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """What engines may reserve of the host's memory where there is no GPU; 0: 70 % of what is there."""
    max_engines_per_pool: Annotated[int, Meta(ge=1)] = 4
    stop_grace_s: Seconds = 3.0
    """Between SIGTERM and SIGKILL of a drained engine."""
    start_silence_s: Seconds = 300.0
    """A start that makes no progress for so long has failed."""
    backoff_s: Seconds = 2.0
    """First wait after a failed start; doubles up to `backoff_max_s`."""
    backoff_max_s: Seconds = 300.0


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How engines are started."""

    start: Literal["fork", "spawn"] = "fork"
    launcher: Literal["local", "memory"] = "local"
    python: str = ""
    """Interpreter of the engine environment; empty: `.venv-engine/bin/python` beside Greenroom's own environment."""
    log_bytes: Annotated[int, Meta(ge=65_536)] = 10 << 20
    """An engine's log is rotated beyond this size; one older file is kept."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of it."""

    data_dir: str = "~/.local/share/greenroom"
    run_dir: str = ""
    """For sockets; short (Unix socket paths end at 107 bytes); empty: `/tmp/greenroom-<uid>-<hash of data_dir>`."""
    database_url: str = ""
    """Empty: an embedded Postgres under `data_dir` (run by `greenroom up`)."""
    redis_url: str = ""
    """Empty: an embedded Valkey (run by `greenroom up`)."""
    pepper: str = ""
    """Keys the HMAC of API keys; empty: `<data_dir>/pepper`, made by `greenroom migrate`."""
    admin_url: str = ""
    """Where the command line finds the admin API; empty: the local operators' listener."""
    admin_key: str = ""
    """The command line's admin key; empty: `<data_dir>/admin-key`."""
    otlp_endpoint: str = ""
    """Base URL of an OTLP/HTTP collector; empty: traces stay in the process."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    gateway: GatewaySettings = GatewaySettings()
    controller: ControllerSettings = ControllerSettings()
    engine: EngineSettings = EngineSettings()

    @property
    def data_path(self) -> Path:
        """`data_dir`, absolute."""
        return Path(self.data_dir).expanduser().absolute()

    @property
    def run_path(self) -> Path:
        """`run_dir`, absolute and short."""
        if self.run_dir:
            return Path(self.run_dir).expanduser().absolute()
        digest = hashlib.sha256(str(self.data_path).encode()).hexdigest()[:8]
        return Path(f"/tmp/greenroom-{os.getuid()}-{digest}")  # noqa: S108 (made 0700 and its owner checked)

    @property
    def models_path(self) -> Path:
        """The model store: one folder a digest."""
        return self.data_path / "models"

    @property
    def engines_path(self) -> Path:
        """One folder an engine: log, book, phases."""
        return self.data_path / "engines"

    @property
    def host_socket(self) -> Path:
        """The engine host's socket."""
        return self.run_path / "host.sock"

    @property
    def postgres_dir(self) -> Path:
        """Directory of the embedded Postgres' socket."""
        return self.run_path / "pg"

    @property
    def effective_database_url(self) -> str:
        """The configured database, or the embedded one."""
        return self.database_url or f"postgresql://postgres:@/greenroom?host={self.postgres_dir}"

    @property
    def effective_redis_url(self) -> str:
        """The configured Redis or Valkey, or the embedded one."""
        return self.redis_url or f"unix://{self.run_path / 'valkey.sock'}"

    @property
    def engine_python(self) -> Path:
        """Interpreter of the engine environment."""
        if self.engine.python:
            return Path(self.engine.python).expanduser().absolute()
        return Path(sys.prefix).parent / ".venv-engine" / "bin" / "python"


def load(environ: Mapping[str, str], *, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Build the settings from a TOML file, the environment and flags (dotted names: `gateway.port`).

    Without `file`, `greenroom.toml` in the working directory is read if it is there. Raises `SettingsInvalid`.
    """
    tree: dict[str, Any] = {}
    path = file or Path("greenroom.toml")
    if file is not None or path.exists():
        try:
            tree = tomllib.loads(path.read_text())
        except OSError as error:
            raise SettingsInvalid(f"{path}: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise SettingsInvalid(f"{path}: {error}") from None
    for name, value in environ.items():
        if name.startswith(PREFIX):
            _put(tree, name.removeprefix(PREFIX).lower().split("__"), value, name)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(tree, name.split("."), value, f"--{name}")
    try:
        return msgspec.convert(tree, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsInvalid(f"settings: {error}") from None


def _put(tree: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsInvalid(f"settings: {name}: `{part}` is a value, not a group")
    tree[path[-1]] = value
