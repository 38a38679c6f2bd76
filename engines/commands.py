"""What operators ask of the controller, as the payload of a Postgres notification on `CHANNEL`. Pure.

    {"op": "stop", "engine": "…", "force": false}
    {"op": "prewarm", "workspace": "acme", "variant": "support-bot"}

Notifications reach whoever leads at that moment, or nobody: a command is a wish, and its effect is seen in the fleet.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from engines.model import EngineId

CHANNEL: Final = "greenroom_command"


class Stop(Struct, frozen=True, tag_field="op", tag="stop"):
    """Drain an engine and stop it; with `force` without waiting for its requests."""

    engine: EngineId
    force: bool = False


class Prewarm(Struct, frozen=True, tag_field="op", tag="prewarm"):
    """Have an engine ready for a variant, as if it had been used now."""

    workspace: str
    variant: str


Command = Stop | Prewarm


def encode(command: Command) -> str:
    """The payload of a command."""
    return msgspec.json.encode(command).decode()


def decode(payload: str) -> Command | None:
    """A payload as a command; `None` if it isn't one."""
    try:
        command: Command = msgspec.json.decode(payload, type=Command)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return command
