"""What every engine has of Greenroom's, installed in its own processes: stamps of its start-up, and the engine book."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engines.host import phases, seams
from engines.host.book import EngineBook
from engines.host.layout import Layout


def install(layout: Layout, *, book: bool) -> None:
    """Install the hooks of a process: stamps in every one, the book in the one that serves HTTP.

    An engine that vLLM's version doesn't let us hook runs without; its log says so.
    """
    if missing := seams.missing(seams.HOOKS):
        print(f"no engine book and no phases: this vLLM has no {', '.join(missing)}", file=sys.stderr)  # noqa: T201
        return
    stamp_phases(layout.phases)
    if book:
        keep_book(layout.book)


def stamp_phases(file: Path) -> None:
    """Stamp the ends of the start-up's phases, in whichever process they happen."""

    def stamp(phase: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: phases.stamp(file, phase)

    seams.after(seams.CONFIG, stamp(phases.CONFIG))
    seams.before(seams.KV_CACHES, stamp(phases.WEIGHTS))
    seams.after(seams.CORE, stamp(phases.INIT))
    seams.after_await(seams.LISTEN, stamp(phases.LISTENING))


def keep_book(file: Path) -> None:
    """Enter the end of every request in the engine book.

    vLLM's stat-logger extension would see finished requests too, but neither the engine's id of a sequence, nor its
    times on the engine's clock, nor aborts. `OutputProcessor` has all three, and has them before a client can see the
    last token. It knows an end in three ways: a finished sequence, an abort, and the death of the engine core.
    """
    book = EngineBook(file)
    abort_requests = seams.find(seams.ABORT)

    def finished(_self: Any, state: Any, reason: Any, *_args: Any) -> None:
        book.write(state, str(reason))

    def failed(self: Any, _error: Exception) -> None:
        for state in self.request_states.values():
            book.write(state, "error")

    def abort(self: Any, request_ids: Iterable[str], internal: bool) -> list[str]:
        states = dict(self.request_states)
        aborted: list[str] = abort_requests(self, request_ids, internal)
        for request_id in aborted:
            book.write(states[request_id], "abort")
        return aborted

    seams.after(seams.FINISHED, finished)
    seams.before(seams.FAILED, failed)
    seams.replace(seams.ABORT, abort)
