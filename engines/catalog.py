"""The variants of all workspaces in memory, so that naming one costs no database read.

A process has one `Catalog`. It is loaded once at start, and again whenever Postgres says that something changed
(`notified`) or that listening began anew. Readers see the old state or the new, never a mixture. While Postgres is away
it keeps what it knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import asyncpg
import structlog

from engines import queries
from engines.model import Variant

CHANNEL: Final = queries.CATALOG_CHANNEL
_RETRY_S = 0.5

log = structlog.get_logger()


class Catalog:
    """Variants by workspace and name. The pool stays the caller's."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool
        self._variants: Mapping[str, Mapping[str, Variant]] = {}
        self._callbacks: list[Callable[[tuple[Variant, ...]], None]] = []
        self._stale = asyncio.Event()

    def get(self, workspace: str, name: str) -> Variant | None:
        """A workspace's variant."""
        return self._variants.get(workspace, {}).get(name)

    def of(self, workspace: str) -> tuple[Variant, ...]:
        """A workspace's variants by name."""
        return tuple(self._variants.get(workspace, {}).values())

    def all(self) -> tuple[Variant, ...]:
        """Every variant of every workspace that isn't disabled."""
        return tuple(variant for variants in self._variants.values() for variant in variants.values())

    def subscribe(self, callback: Callable[[tuple[Variant, ...]], None]) -> None:
        """Call `callback` with `all()` after each load that changed something."""
        self._callbacks.append(callback)

    async def load(self) -> None:
        """Read everything now; raises what asyncpg raises if Postgres is away."""
        self._stale.clear()
        variants: dict[str, dict[str, Variant]] = {}
        for variant in await queries.all_variants(self._pool):
            variants.setdefault(variant.workspace, {})[variant.name] = variant
        if variants != self._variants:
            self._variants = variants
            for callback in self._callbacks:
                callback(self.all())

    def notified(self, payload: str = "") -> None:  # noqa: ARG002 (what a notification's callback gets)
        """Something may have changed: `run` will load again. Many calls while it loads cost one more load."""
        self._stale.set()

    async def run(self) -> None:
        """Load whenever `notified`, until cancelled; tries again each half second while Postgres is away."""
        while True:
            await self._stale.wait()
            try:
                await self.load()
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                log.warning("catalog_load_failed", error=type(error).__name__)
                self._stale.set()
                await asyncio.sleep(_RETRY_S)
