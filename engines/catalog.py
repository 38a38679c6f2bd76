"""The variants of all workspaces in memory, so that naming one costs no database read.

A process has one `Catalog`. It is loaded once at start, and again whenever Postgres says that something changed
(`notified`) or that listening began anew. Readers see the old state or the new, never a mixture. Whoever has just made
a variant may name it before that notification is here: `find` looks for what isn't known. While Postgres is away it
keeps what it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import asyncpg
import structlog

from engines import queries
from engines.model import NAME_PATTERN, Variant

CHANNEL: Final = queries.CATALOG_CHANNEL
_RETRY_S = 0.5
_FIND_S = 2.0
_is_name: Final = re.compile(NAME_PATTERN).match

log = structlog.get_logger()


class Catalog:
    """Variants by workspace and name. The pool stays the caller's."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool
        self._variants: Mapping[str, Mapping[str, Variant]] = {}
        self._callbacks: list[Callable[[tuple[Variant, ...]], None]] = []
        self._due = asyncio.Event()
        """`run` has something to do."""
        self._stale = False
        self._wanted: dict[tuple[str, str], asyncio.Future[None]] = {}
        """Names that aren't known and that somebody waits for."""

    def get(self, workspace: str, name: str) -> Variant | None:
        """A workspace's variant."""
        return self._variants.get(workspace, {}).get(name)

    async def find(self, workspace: str, name: str) -> Variant | None:
        """A workspace's variant, also if it was made a moment ago; at most two seconds. `run` must be running.

        A possible name that isn't known costs a look by index, one for all who ask; only if it is there, a load too.
        """
        known = self.get(workspace, name)
        if known is not None or not _is_name(name):
            return known
        looked = self._wanted.setdefault((workspace, name), asyncio.get_running_loop().create_future())
        self._due.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIND_S):
                await asyncio.shield(looked)
        return self.get(workspace, name)

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
        self._stale = False
        variants: dict[str, dict[str, Variant]] = {}
        for variant in await queries.all_variants(self._pool):
            variants.setdefault(variant.workspace, {})[variant.name] = variant
        if variants != self._variants:
            self._variants = variants
            for callback in self._callbacks:
                callback(self.all())

    def notified(self, payload: str = "") -> None:  # noqa: ARG002 (what a notification's callback gets)
        """Something may have changed: `run` will load again. Many calls while it loads cost one more load."""
        self._stale = True
        self._due.set()

    async def run(self) -> None:
        """Load whenever `notified`, until cancelled; tries again each half second while Postgres is away."""
        while True:
            await self._due.wait()
            self._due.clear()
            wanted, self._wanted = self._wanted, {}
            try:
                if self._stale or (wanted and await queries.all_have_any(self._pool, wanted)):
                    await self.load()
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                log.warning("catalog_load_failed", error=type(error).__name__)
                self.notified()
                await asyncio.sleep(_RETRY_S)
            finally:
                for looked in wanted.values():
                    looked.set_result(None)
