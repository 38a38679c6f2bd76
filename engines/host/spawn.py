"""Starting an engine without a fork: a new interpreter that imports vLLM itself (slow, and always possible).

The host does this where its gate says that forking isn't safe, or when told to. The interpreter runs `spawned.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from engines.host import phases
from engines.host.layout import Layout
from engines.host.protocol import StartOrder, start_request

_SCRIPT = Path(__file__).with_name("spawned.py")


def start(order: StartOrder, environment: Mapping[str, str]) -> int:
    """Start the engine in a session of its own and return its pid, which the caller reaps; `OSError` if it can't be."""
    layout = Layout.of(order)
    log = os.open(layout.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), start_request(order).decode().strip()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            cwd=layout.run,
            start_new_session=True,
        )
    finally:
        os.close(log)
    phases.stamp(layout.phases, phases.FORK)
    process.returncode = 0  # keeps Popen from waiting for it: the host reaps all of its children itself
    return process.pid
