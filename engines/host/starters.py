"""The two ways to start an engine, behind one face; which one is decided anew for every engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from engines.host import environment, fork, gate, spawn
from engines.host.layout import Layout
from engines.host.protocol import StartOrder

log = logging.getLogger("greenroom.host")


class Forker:
    """Forks engines as long as nothing rules it out, and spawns them where something does.

    `unfit` is what rules it out for good, `None` if nothing does; `parser` is needed for forking alone.
    """

    def __init__(self, parser: Any, unfit: str | None) -> None:
        self._parser = parser
        self._unfit = unfit
        self._version = gate.version()

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:
        """See `server.Starter`."""
        if reason := self._unfit or gate.shut():
            log.warning("engine %s is spawned, which is slow: %s", order.engine, reason)
            return spawn.start(order, _environment(order))
        return fork.start(order, _environment(order), parser=self._parser, leave=leave)

    def describe(self) -> dict[str, Any]:
        """See `server.Starter`."""
        reason = self._unfit or gate.shut()
        return {"mode": "spawn" if reason else "fork", "vllm": self._version, "gate": reason}


class Spawner:
    """Spawns every engine, as told to on the command line."""

    def __init__(self) -> None:
        self._version = gate.version()

    def start(self, order: StartOrder, leave: Callable[[], None]) -> int:  # noqa: ARG002 (a spawned child has left)
        """See `server.Starter`."""
        return spawn.start(order, _environment(order))

    def describe(self) -> dict[str, Any]:
        """See `server.Starter`."""
        return {"mode": "spawn", "vllm": self._version, "gate": None}


def _environment(order: StartOrder) -> dict[str, str]:
    temporary = Layout.of(order).temporary
    return environment.engine_environment(os.environ, temporary=temporary, threads=order.threads, extra=order.env)
