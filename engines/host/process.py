"""What a process of an engine asks of the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from importlib import import_module
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_OOM_SCORE = 500

_libc = ctypes.CDLL(None, use_errno=True)


def name(title: str) -> None:
    """Show as this in `ps`. The first call must come before the environment is changed, whose place the title takes."""
    with contextlib.suppress(ImportError):
        import_module("setproctitle").setproctitle(title)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has died (a child subreaper), so that they can be reaped."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent dies; to be called first thing in a child of an engine's process.

    A parent that has died before is seen by whose child this is now: the engine host's, which is of another session.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        orphaned = os.getsid(os.getppid()) != os.getsid(0)
    except OSError:
        orphaned = True
    if orphaned:
        os._exit(1)


def confine() -> None:
    """Limits of every engine process: no core files, which would hold prompts; killed first when memory runs out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
