"""What callers are told when an engine can't be started: a hint without paths, log lines or exit codes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

NOT_LOADED: Final = "the model could not be loaded"

_HINTS: Final = (
    (
        re.compile(r"out of memory|cannot allocate memory|MemoryError|bad_alloc", re.IGNORECASE),
        "the engine ran out of memory while loading the model",
    ),
    (
        re.compile(r"larger than the available KV cache|No available memory for the cache blocks"),
        "the model's context does not fit its KV cache",
    ),
    (
        re.compile(r"SafetensorError|Error while deserializing|HeaderTooLarge"),
        "the model's weights could not be read",
    ),
    (re.compile(r"no progress"), "the engine made no progress while starting"),
    (re.compile(r"killed by SIGKILL"), "the engine was killed while loading the model; memory may be short"),
    (re.compile(r"not in the model store"), "the model's files are missing"),
    (re.compile(r"engine host"), "the engine host could not start an engine"),
)


def hint(reason: str, last_lines: Iterable[str] = ()) -> str:
    """The hint for a start that failed for `reason` (of the launcher) with these last lines in the engine's log."""
    for text in (reason, *reversed(tuple(last_lines))):
        for pattern, words in _HINTS:
            if pattern.search(text):
                return words
    return NOT_LOADED
