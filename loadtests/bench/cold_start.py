"""B1: from zero engines to the first token through the gateway, beside stock starts of the same engine.

In every round, in this order: ours; stock (vLLM as it comes); stock tuned (the environment of our engines). All three
load the same files with the same engine arguments, the page cache is warm, and one stock start that isn't measured has
filled vLLM's model-info cache. The first token is the first `data:` event with content that a plain client reads.

Ours is also split up: the controller's decision, the phases that the engine stamps, and the way back to the client.
"""

from __future__ import annotations

import http.client
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from engines.arguments import vllm_argv
from engines.model import EngineSpec, Model
from loadtests.bench import stock
from loadtests.bench.chat import Answer, ask
from loadtests.bench.stack import Stack

PHASES = ("fork", "config", "weights", "init", "listening")
QUICK_S = 150.0
"""A quick run starts nothing more after so long."""


@dataclass
class Times:
    """Zero to first token in seconds, one entry a run."""

    ours: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    tuned: list[float] = field(default_factory=list)
    steps_ms: list[dict[str, float]] = field(default_factory=list)
    """Of each of our runs: where the time went."""


def run(model: Path, *, runs: int, quick: bool) -> dict[str, Any]:
    """Measure, print a table, and return the keys of the JSON line."""
    began = time.monotonic()
    times = Times()
    with Stack() as stack, tempfile.TemporaryDirectory(prefix="gr-cache-") as cache:
        key = stack.set_up(model, {"bench": {"scaling": {"idle_timeout_s": 3600}}})
        engine = _Stock(stack, Path(cache))
        engine.first_token(tuned=False)
        for number in range(runs):
            took_s, steps_ms = _ours(stack, key)
            times.ours.append(took_s)
            times.steps_ms.append(steps_ms)
            print(f"run {number + 1}: ours {took_s:.2f} s ({_steps(steps_ms)})", flush=True)
            for name, tuned in (("stock", False), ("tuned", True)):
                if quick and (number > 0 or time.monotonic() - began > QUICK_S):
                    continue
                took_s = engine.first_token(tuned=tuned)
                getattr(times, name).append(took_s)
                print(f"run {number + 1}: {name} {took_s:.2f} s", flush=True)
    print(_table(times))
    return line_of(times)


class _Stock:
    """Stock starts of the model that the stack has stored."""

    def __init__(self, stack: Stack, cache: Path) -> None:
        manifest = next((stack.data_dir / "models").glob("*.json"))
        model = msgspec.json.decode(manifest.read_bytes(), type=Model)
        self._cache = cache
        self._python = stack.settings.engine_python
        self._model = manifest.with_suffix("")
        self._argv = vllm_argv(EngineSpec(model_digest=model.digest), model)
        if not stock.is_byte_compiled(self._python):
            print(f"note: {self._python} is not byte-compiled; stock starts are slower than they could be", flush=True)

    def first_token(self, *, tuned: bool) -> float:
        """Seconds from the spawn to the first token."""
        env = stock.tuned_env(self._cache) if tuned else stock.default_env(self._cache)
        with stock.StockEngine(self._python, self._model, self._argv, env) as engine:
            took_s, _ = engine.first_token()
            return took_s


def _ours(stack: Stack, key: str) -> tuple[float, dict[str, float]]:
    """One start from zero engines, and where its time went, in milliseconds."""
    stack.stop_engines()
    answer = ask(http.client.HTTPConnection("127.0.0.1", stack.port, timeout=120), model="bench", key=key)
    (engine,) = stack.engines()
    return answer.first_token_s, steps_of(answer, engine)


def steps_of(answer: Answer, engine: dict[str, Any]) -> dict[str, float]:
    """The parts of a first token's time, in milliseconds, in order; they sum to it.

    `decide`: from the client's request to the engine's placing; then the engine's own phases; `route`: from its being
    ready (as the controller wrote it) to the first token; `rest`: what lies between these clocks, mostly the order to
    the engine host and noticing that the engine listens.
    """
    created_at, ready_at = (datetime.fromisoformat(engine[name]).timestamp() for name in ("created_at", "ready_at"))
    decide = (created_at - answer.sent_at) * 1000
    phases = {name: engine["phases_us"].get(name, 0) / 1000 for name in PHASES}
    route = (answer.sent_at + answer.first_token_s - ready_at) * 1000
    rest = answer.first_token_s * 1000 - decide - sum(phases.values()) - route
    return {"decide": decide, **phases, "rest": rest, "route": route}


def _steps(steps_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.0f}" for name, ms in steps_ms.items()) + " ms"


def _table(times: Times) -> str:
    lines = [f"{'zero to first token, s':<24}{'n':>4}{'median':>9}{'min':>9}{'max':>9}"]
    for name, values in (("Greenroom", times.ours), ("stock", times.stock), ("stock, tuned", times.tuned)):
        if values:
            lines.append(
                f"{name:<24}{len(values):>4}{statistics.median(values):>9.2f}{min(values):>9.2f}{max(values):>9.2f}"
            )
    lines.append(f"{'of which, ms':<24}{'':>4}{'median':>9}{'min':>9}{'max':>9}")
    for name in times.steps_ms[0]:
        values = [steps[name] for steps in times.steps_ms]
        lines.append(f"  {name:<22}{'':>4}{statistics.median(values):>9.0f}{min(values):>9.0f}{max(values):>9.0f}")
    return "\n".join(lines)


def line_of(times: Times) -> dict[str, Any]:
    """The keys of the JSON line: medians."""
    ours, stocks, tuned = (_median(values) for values in (times.ours, times.stock, times.tuned))
    return {
        "first_token_s": ours,
        "stock_first_token_s": stocks,
        "tuned_stock_first_token_s": tuned,
        "ratio": round(stocks / ours, 2) if ours and stocks else None,
        "stock_runs": len(times.stock),
        "steps_ms": {name: round(statistics.median(s[name] for s in times.steps_ms)) for name in times.steps_ms[0]},
    }


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
