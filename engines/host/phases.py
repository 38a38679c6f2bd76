"""Stamps of an engine's start-up: one JSON line a phase, at the moment at which the phase has ended.

fork         the engine's first process exists
config       vLLM has read the model's config and made its own
weights      the model is built and its weights are loaded
init         the KV cache is there and the engine core is ready for requests
listening    the server accepts connections
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

FORK = "fork"
CONFIG = "config"
WEIGHTS = "weights"
INIT = "init"
LISTENING = "listening"


def now_us() -> int:
    """CLOCK_MONOTONIC in microseconds; the same clock in every process of the machine."""
    return time.monotonic_ns() // 1000


def stamp(file: Path, phase: str) -> None:
    """Append one stamp; processes of one engine may do so at the same time."""
    line = json.dumps({"phase": phase, "at_us": now_us()}).encode() + b"\n"
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)
