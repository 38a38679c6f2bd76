"""What a process of an engine asks of the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_OOM_SCORE = 500

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has died (a child subreaper), so that they can be reaped."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent dies; to be called in the child. The caller must check that the parent still lives."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def bind_children() -> None:
    """Let every process that is forked from here on die with the process that forked it.

    Otherwise a killed leader leaves its EngineCore behind, with the memory of the model.
    """
    parent = 0

    def remember() -> None:
        nonlocal parent
        parent = os.getpid()

    def belong() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it died between the fork and the line above
            os._exit(1)

    os.register_at_fork(before=remember, after_in_child=belong)


def confine() -> None:
    """Limits of every engine process: no core files, which would hold prompts; killed first when memory runs out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
