"""Forking an engine from the process that has imported vLLM, and what its first process must do before it is one.

After the fork the child is a copy of the engine host, so nearly everything it does first is to stop being one: see
`_leave_host`, in order. It never returns into the host's code: whatever happens, `_run` ends in `os._exit`.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NoReturn

from engines.host import engine, phases, process
from engines.host.layout import Layout
from engines.host.protocol import StartOrder


def start(order: StartOrder, environment: Mapping[str, str], *, parser: Any, leave: Callable[[], None]) -> int:
    """Fork the engine and return its pid; `OSError` if it can't be.

    `leave` closes, in the child, what the host's server holds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _run(order, environment, parser, leave)
    return pid


def _run(order: StartOrder, environment: Mapping[str, str], parser: Any, leave: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        phases.stamp(Layout.of(order).phases, phases.FORK)
        _leave_host(order, environment, leave)
        engine.serve_early(order, parser)
        status = 0
    except SystemExit as request:
        status = request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException:  # (the end of the process: its log is the last to hear of it)
        traceback.print_exc()
    finally:
        _exit(status)


def _exit(status: int) -> NoReturn:
    """End like an interpreter would, without unwinding into the host's frames."""
    try:
        for child in multiprocessing.active_children():  # none, if vLLM came to its own end
            child.kill()
        atexit._run_exitfuncs()  # noqa: SLF001
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _leave_host(order: StartOrder, environment: Mapping[str, str], leave: Callable[[], None]) -> None:
    """Be no host any more: 1 session, 2 signals, 3 descriptors, 4 environment, 5 children, 6 threads, 7 seeds."""
    # 1. A session and process group of its own; the host's death doesn't end it (no PDEATHSIG here, on purpose).
    os.setsid()
    # 2. Signals as a new program finds them.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # 3. Nothing of the host stays open; standard streams go to the engine's log.
    leave()
    layout = Layout.of(order)
    _redirect(layout)
    os.closerange(3, 65_536)
    # 4. The environment, and what Python and vLLM have already derived from the host's.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME", None)  # made once a process tree, else shared by all engines
    tempfile.tempdir = None
    os.chdir(layout.run)
    sys.argv = ["engine"]
    # 5. multiprocessing: a secret and a resource tracker of its own; children are forked and die with this process.
    multiprocessing.current_process().authkey = os.urandom(32)
    tracker = multiprocessing.resource_tracker._resource_tracker  # noqa: SLF001
    tracker._fd = tracker._pid = None  # type: ignore[attr-defined]  # noqa: SLF001
    os.register_at_fork(after_in_child=process.die_with_parent)
    # 6. Threads, before the first parallel region.
    torch = import_module("torch")
    torch.set_num_threads(order.threads)
    # 7. Randomness that the fork has copied (Python's own `random` sees to itself, uuid and secrets ask the kernel).
    import_module("numpy").random.seed(int.from_bytes(os.urandom(4)))
    torch.manual_seed(int.from_bytes(os.urandom(7)))
    gc.enable()


def _redirect(layout: Layout) -> None:
    log = os.open(layout.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
