"""What Greenroom changes in vLLM, each by wrapping one function; all of it in this file, none of it in vLLM's files.

`missing()` names what a vLLM version lacks; the host then starts engines the stock way. Hooks that are installed before
a fork serve every engine; those that know an engine's files are installed in the engine's own process.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.host import phases
from engines.host.book import EngineBook

WRAPPED = (
    ("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config"),
    ("vllm.v1.engine.core", "EngineCore._initialize_kv_caches"),
    ("vllm.v1.engine.core", "EngineCoreProc.__init__"),
    ("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup"),
    ("vllm.v1.engine.output_processor", "OutputProcessor._update_stats_from_finished"),
    ("vllm.v1.engine.output_processor", "OutputProcessor.abort_requests"),
    ("vllm.v1.engine.output_processor", "OutputProcessor.propagate_error"),
    ("vllm.model_executor.models.registry", "_run_in_subprocess"),
    ("vllm.utils.system_utils", "get_mp_context"),
)


def missing() -> tuple[str, ...]:
    """The wrapped functions that this vLLM doesn't have."""
    return tuple(f"{module}.{path}" for module, path in WRAPPED if _find(module, path) is None)


def fork_children() -> None:
    """Let vLLM fork its processes where it would spawn them: `get_mp_context` in every loaded module that holds it."""

    def get_mp_context() -> Any:
        return multiprocessing.get_context("fork")

    for name, module in tuple(sys.modules.items()):
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = get_mp_context  # type: ignore[attr-defined]


def inspect_in_process() -> None:
    """Let the model registry look at a class in this process; it starts another, since importing may wake CUDA."""
    registry = import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]  # noqa: SLF001


def stamp_phases(file: Path) -> None:
    """Stamp the ends of the start-up's phases, in whichever process they happen."""

    def after(phase: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: phases.stamp(file, phase)

    _wrap("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config", after=after(phases.CONFIG))
    _wrap("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", before=after(phases.WEIGHTS))
    _wrap("vllm.v1.engine.core", "EngineCoreProc.__init__", after=after(phases.INIT))
    _wrap_async("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup", after=after(phases.LISTENING))


def keep_book(file: Path) -> None:
    """Enter the end of every request in the engine book.

    vLLM's stat-logger extension would see finished requests too, but neither the engine's id of a sequence nor its
    times, nor aborts; `OutputProcessor` has all three, and has them before a client can see the last token.
    """
    book = EngineBook(file)
    owner = _find("vllm.v1.engine.output_processor", "OutputProcessor")
    abort_requests = owner.abort_requests

    def finished(_self: Any, state: Any, reason: Any, *_args: Any) -> None:
        book.write(state, str(reason))

    def failed(self: Any, _error: Exception) -> None:
        for state in self.request_states.values():
            book.write(state, "error")

    def aborting(self: Any, request_ids: Iterable[str], internal: bool) -> list[str]:
        states = dict(self.request_states)
        aborted: list[str] = abort_requests(self, request_ids, internal)
        for request_id in aborted:
            book.write(states[request_id], "abort")
        return aborted

    _wrap("vllm.v1.engine.output_processor", "OutputProcessor._update_stats_from_finished", after=finished)
    _wrap("vllm.v1.engine.output_processor", "OutputProcessor.propagate_error", before=failed)
    owner.abort_requests = aborting


def _find(module: str, path: str) -> Any:
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _place(module: str, path: str) -> tuple[Any, str]:
    owner, _, name = path.rpartition(".")
    return _find(module, owner), name


def _wrap(
    module: str, path: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    owner, name = _place(module, path)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def _wrap_async(module: str, path: str, *, after: Callable[..., None]) -> None:
    owner, name = _place(module, path)
    original = getattr(owner, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)
