"""The engine host's protocol: newline-delimited JSON over a Unix socket, one reply a request, in order.

Standard library only: this file is imported by Greenroom's environment and by the engine environment.

Requests                                                     Replies
{"op": "hello", "epoch": 3}                                  {"ok": true, "mode": "fork"|"spawn", "pid": 4711,
                                                              "vllm": "0.32.0", "gate": null|"why it can't fork"}
{"op": "start", "epoch": 3, "engine": ID, ...StartOrder}     {"ok": true, "pid": 4712, "pid_start": 889912}
{"op": "list"}                                               {"ok": true, "engines": {ID: {"pid":…, "pid_start":…}}}
{"op": "exit_status", "engine": ID}                          {"ok": true, "status": null|int}   (negative: signal)

A request that can't be done is answered {"ok": false, "error": "…", "code": "stale_epoch"|"bad_request"|"fork_failed"}.
The host remembers the highest epoch that it has seen and refuses to start for a lower one.

An engine's files
  <engine_dir>/log            stdout and stderr of all its processes
  <engine_dir>/book.jsonl     the engine book (see `book`)
  <engine_dir>/phases.jsonl   {"phase": "fork"|"config"|"weights"|"init"|"listening", "at_us": CLOCK_MONOTONIC in µs}
  <run_dir>/s                 its Unix socket
  <run_dir>/t                 its temporary directory
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_LINE = 1 << 20


@dataclass(frozen=True)
class StartOrder:
    """Everything that the host needs to start one engine. Paths are absolute; the host makes the directories (0700)."""

    engine: str
    epoch: int
    model_path: str
    served_name: str
    engine_dir: str
    run_dir: str
    argv: tuple[str, ...]
    """Command-line arguments of vLLM without model path, socket and served name; the launcher makes them."""
    env: dict[str, str] = field(default_factory=dict)
    """Added to the engine's fresh environment (for example CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS)."""
    threads: int = 1


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """One line as a message; `ValueError` if it isn't a JSON object."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message


def start_request(order: StartOrder) -> bytes:
    """The line that asks for an engine."""
    return encode({"op": "start", **asdict(order)})


def parse_start(message: dict[str, Any]) -> StartOrder:
    """A `StartOrder` from a decoded message; `ValueError` names what is missing, unknown or of the wrong type."""
    fields = {k: v for k, v in message.items() if k != "op"}
    try:
        order = StartOrder(**fields)
    except TypeError as error:
        raise ValueError(str(error)) from None
    _check_types(order)
    return StartOrder(**{**asdict(order), "argv": tuple(order.argv)})


def _check_types(order: StartOrder) -> None:
    kinds: dict[str, tuple[type, ...]] = {"epoch": (int,), "threads": (int,), "argv": (list, tuple), "env": (dict,)}
    for name, value in asdict(order).items():
        if not isinstance(value, kinds.get(name, (str,))) or isinstance(value, bool):
            raise ValueError(f"{name} is of the wrong type: {type(value).__name__}")
    if not all(isinstance(text, str) for text in (*order.argv, *order.env.values())):
        raise ValueError("argv and env hold strings")
