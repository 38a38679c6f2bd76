"""`./dev smoke`: one real chat from zero engines through the official client, then everything stops.

Prints what happens, and one JSON line last: `engine_start_s` (placed → ready, as the controller recorded it),
`first_token_s` (the client's, from before it connects), `tokens` (the engine's count), `answer`. Exit status 0 only if
the answer is a real one, the ledger agrees with the client, and nothing is left running or lying about.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import openai

from loadtests.bench.stack import LeftBehind, Stack, StackFailed

QUESTION = "What is the capital of France?"
ANSWER = "paris"
VARIANT = "smoke"


class SmokeFailed(Exception):
    """The chat did not go as it should; the message says how."""


@dataclass(frozen=True)
class Chat:
    """What the client saw."""

    first_token_s: float
    tokens: int
    answer: str


def chat(base_url: str, key: str) -> Chat:
    """One streamed chat at temperature 0."""
    parts: list[str] = []
    first_token_s, tokens = None, 0
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=300) as client:
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model=VARIANT,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=32,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first_token_s = first_token_s or time.perf_counter() - start
                parts.append(chunk.choices[0].delta.content)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
    if first_token_s is None:
        raise SmokeFailed("the stream ended without a token")
    return Chat(round(first_token_s, 3), tokens, "".join(parts).strip())


def smoke(model: Path) -> dict[str, Any]:
    """Start, ask, check, stop. Raises `SmokeFailed`, `StackFailed`, `LeftBehind`, `openai.OpenAIError`."""
    with Stack() as stack:
        print(f"up on {stack.url}, data in {stack.data_dir}", flush=True)
        key = stack.set_up(model, {VARIANT: {}})
        if engines := stack.engines():
            raise SmokeFailed(f"there are engines before anybody asked: {engines}")
        seen = chat(stack.url, key)
        print(f"{QUESTION} {seen.answer}", flush=True)
        (engine,) = stack.engines()
        (used,) = stack.admin("GET", "/usage?by=workspace")["data"]
        created_at, ready_at = (datetime.fromisoformat(engine[name]).timestamp() for name in ("created_at", "ready_at"))
    if ANSWER not in seen.answer.lower():
        raise SmokeFailed(f"not a real answer: {seen.answer!r}")
    booked = (used["requests"], used["cold"], used["completion_tokens"])
    if booked != (1, 1, seen.tokens) or seen.tokens <= 0:
        raise SmokeFailed(f"the ledger has {booked} requests, cold ones and tokens; the client saw 1, 1, {seen.tokens}")
    return {
        "engine_start_s": round(ready_at - created_at, 3),
        "first_token_s": seen.first_token_s,
        "tokens": seen.tokens,
        "answer": seen.answer,
    }


def main(argv: list[str]) -> int:
    """Exit status 1 and one line on standard error if anything is wrong."""
    parser = argparse.ArgumentParser(prog="smoke")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model (safetensors)")
    options = parser.parse_args(argv)
    try:
        line = smoke(options.model.absolute())
    except (SmokeFailed, StackFailed, LeftBehind, openai.OpenAIError, OSError) as error:
        print(f"smoke: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    print("nothing is left running", flush=True)
    print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
