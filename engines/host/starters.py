"""The two ways to start an engine, behind one face; which one is decided anew for every engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from engines.host import environment, fork, preload, spawn
from engines.host.layout import Layout
from engines.host.protocol import StartOrder

log = logging.getLogger("greenroom.host")


class Forker:
    """Forks engines as long as the gate is open, and spawns them where it is shut."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:
        """See `server.Starter`."""
        if reason := preload.gate():
            log.warning("engine %s is spawned, which is slow: %s", order.engine, reason)
            return spawn.start(order, _environment(order))
        return fork.start(order, _environment(order), parser=self._parser, leave=leave)

    def describe(self) -> dict[str, Any]:
        """See `server.Starter`."""
        gate = preload.gate()
        mode: Literal["fork", "spawn"] = "spawn" if gate else "fork"
        return {"mode": mode, "vllm": preload.version(), "gate": gate}


class Spawner:
    """Spawns every engine, as told to on the command line."""

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:  # noqa: ARG002 (a spawned child has left)
        """See `server.Starter`."""
        return spawn.start(order, _environment(order))

    def describe(self) -> dict[str, Any]:
        """See `server.Starter`."""
        return {"mode": "spawn", "vllm": preload.version(), "gate": None}


def _environment(order: StartOrder) -> dict[str, str]:
    temporary = Layout.of(order).temporary
    return environment.engine_environment(os.environ, temporary=temporary, threads=order.threads, extra=order.env)
