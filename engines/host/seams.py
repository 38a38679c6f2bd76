"""The functions of vLLM that Greenroom wraps or replaces: all of them, so that a new version is checked at a glance.

`hooks` needs the first group, in whichever way an engine is started; `shortcuts` and `early` need the second, and where
one of those is missing engines are spawned instead of forked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

Seam = tuple[str, str]
"""A module's name and a path of attributes in it."""

CONFIG: Final = ("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config")
KV_CACHES: Final = ("vllm.v1.engine.core", "EngineCore._initialize_kv_caches")
CORE: Final = ("vllm.v1.engine.core", "EngineCoreProc.__init__")
LISTEN: Final = ("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup")
FINISHED: Final = ("vllm.v1.engine.output_processor", "OutputProcessor._update_stats_from_finished")
ABORT: Final = ("vllm.v1.engine.output_processor", "OutputProcessor.abort_requests")
FAILED: Final = ("vllm.v1.engine.output_processor", "OutputProcessor.propagate_error")

HOOKS: Final = (CONFIG, KV_CACHES, CORE, LISTEN, FINISHED, ABORT, FAILED)

FORK: Final = (
    ("vllm.utils.system_utils", "get_mp_context"),
    ("vllm.model_executor.models.registry", "_run_in_subprocess"),
    ("vllm.model_executor.models.registry", "ModelRegistry.register_model"),
    ("vllm.logger", "configure_logging_if_needed"),
    ("vllm.v1.engine.core", "configure_logging"),
    ("vllm.renderers.hf", "_try_get_processor_chat_template"),
    ("vllm.renderers.hf", "maybe_make_thread_pool"),
    ("vllm.v1.structured_output", "cached_tokenizer_from_config"),
    ("vllm.v1.structured_output", "StructuredOutputManager"),
    ("vllm.platforms", "current_platform.register_triton_kernel_overrides"),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
    ("vllm.v1.engine.core_client", "launch_core_engines"),
    ("vllm.v1.engine.core_client", "get_engine_zmq_bind_addresses"),
    ("vllm.v1.engine.core_client", "make_zmq_socket"),
    ("vllm.v1.engine.utils", "bind_engine_zmq_listeners"),
    ("vllm.v1.engine.core_client", "MPClient._start_mm_warmup"),
    ("vllm.entrypoints.launchers.api_server.entry", "build_async_engine_client_from_engine_args"),
    ("vllm.entrypoints.launchers.api_server.entry", "build_and_serve"),
    ("vllm.entrypoints.launchers.api_server.entry", "build_app"),
)


def find(seam: Seam) -> Any:
    """What is there; `None` if there is nothing."""
    module, path = seam
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def missing(seams: tuple[Seam, ...]) -> tuple[str, ...]:
    """Those that the installed vLLM doesn't have."""
    return tuple(".".join(seam) for seam in seams if find(seam) is None)


def replace(seam: Seam, substitute: Any) -> None:
    """Put something else there."""
    module, path = seam
    owner, _, name = path.rpartition(".")
    setattr(find((module, owner)) if owner else import_module(module), name, substitute)


def before(seam: Seam, action: Callable[..., None]) -> None:
    """Call `action` with the same arguments first."""
    original = find(seam)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    replace(seam, wrapped)


def after(seam: Seam, action: Callable[..., None]) -> None:
    """Call `action` with the same arguments when the function has returned; not if it raises."""
    original = find(seam)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(*args, **kwargs)
        return result

    replace(seam, wrapped)


def after_await(seam: Seam, action: Callable[..., None]) -> None:
    """The same for a coroutine function: when the coroutine has returned."""
    original = find(seam)

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        action(*args, **kwargs)
        return result

    replace(seam, wrapped)
