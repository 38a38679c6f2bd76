"""The engine book: one line for every engine request that ended, whichever way.

An engine request is one sequence: `n = 3` or three prompts in one HTTP request make three lines. Lines add up to what
vLLM's `usage` says of the whole HTTP request: `usage` counts a prompt once however many sequences are made from it, so
the prompt (and what of it was cached) stands in the line of the first sequence and the others say 0. Two of vLLM's own
sums differ from the book's, both in `cached` alone: for several prompts vLLM reports the cached tokens of one of them,
and for `n > 1` without streaming those of the sequence that ended last.

A line is written before any client can see the end of the request, by the process that serves HTTP, with one write to a
descriptor opened for appending: it survives the death of every process of the engine, and lines never mix.

    {"request_id": "0191…", "engine_request_id": "chatcmpl-0191…-1a2b3c4d", "prompt": 37, "cached": 0, "completion": 8,
     "reason": "stop", "start_us": 5121000123, "end_us": 5121310456, "at": 1790000000.5}

request_id         the X-Request-Id that the request came with: vLLM's prefix and suffixes are taken off
engine_request_id  vLLM's own id of the sequence, unique
prompt, cached, completion   tokens; completion counts what the engine had produced when the request ended
reason             "stop", "length", "abort" (the client left or the engine was told to stop), "error" (the engine died)
start_us, end_us   CLOCK_MONOTONIC: first scheduled (or received, if it never was) until the last token (or the abort)
at                 the same end, in seconds since the epoch
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

_PREFIX = re.compile(r"^(?:chatcmpl|cmpl|embd|pool|score|classify|generate-tokens)-")
_NUMBERED = re.compile(r"^(?:cmpl|embd)-.*-\d+$")
_MICRO = 1_000_000


def base_request_id(external_id: str) -> str:
    """The client's request id in vLLM's external one: `chatcmpl-ID`, or `cmpl-ID-<number of the prompt>`."""
    if _NUMBERED.match(external_id):
        external_id = external_id.rpartition("-")[0]
    return _PREFIX.sub("", external_id)


class EngineBook:
    """An open book. It is written by one process, from one thread.

    An engine whose book can't be written (a full disk) serves on and says so in its log.
    """

    def __init__(self, path: Path) -> None:
        self._torn = False
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, state: Any, reason: str) -> None:
        """Enter the end of a request from vLLM's `RequestState`; a second end of the same request is ignored."""
        if getattr(state, "greenroom_entered", False):
            return
        state.greenroom_entered = True
        line = json.dumps(entry(state, reason, time.monotonic(), time.time())).encode() + b"\n"
        if self._torn:  # what follows half a line starts a new one
            line = b"\n" + line
        try:
            self._torn = os.write(self._fd, line) < len(line)
        except OSError as error:
            print(f"the engine book lacks {state.request_id}: {error}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Close it; nothing can be entered any more."""
        os.close(self._fd)


def entry(state: Any, reason: str, monotonic: float, at: float) -> dict[str, Any]:
    """One line from vLLM's `RequestState` and the two clocks as they stand."""
    stats = state.stats
    start = stats.scheduled_ts or stats.queued_ts or monotonic - max(0.0, at - stats.arrival_time)
    end = monotonic if reason in ("abort", "error") or not stats.last_token_ts else stats.last_token_ts
    first = state.request_index == 0
    return {
        "request_id": base_request_id(state.external_req_id),
        "engine_request_id": state.request_id,
        "prompt": state.prompt_len if first else 0,
        "cached": (state.num_cached_tokens or 0) if first else 0,
        "completion": state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0,
        "reason": reason,
        "start_us": int(start * _MICRO),
        "end_us": int(max(start, end) * _MICRO),
        "at": round(at - (monotonic - end), 6),
    }
