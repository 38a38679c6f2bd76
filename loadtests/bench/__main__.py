"""`python -m loadtests.bench NAME [--quick] [--runs N] [--model PATH]`: one benchmark; its last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.bench import cold_start, memory
from loadtests.bench.chat import ChatFailed
from loadtests.bench.stack import LeftBehind, StackFailed
from loadtests.bench.stock import StockFailed


@dataclass(frozen=True)
class Bench:
    """What can be asked for by name."""

    run: Callable[..., dict[str, Any]]
    runs: int
    """By default."""
    quick_runs: int
    about: str


BENCHES = {
    "cold-start": Bench(cold_start.run, 10, 3, "B1: zero to first token, ours beside stock starts of the same engine"),
    "memory": Bench(memory.run, 1, 1, "processes and memory of an idle system, without engines and with two"),
}


def main(argv: list[str]) -> int:
    """Run one; exit status 1 with one line on standard error if it can't be measured."""
    names = "\n".join(f"  {name:<12}{bench.about}" for name, bench in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="bench", epilog=f"benchmarks:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="at most three minutes: fewer runs")
    parser.add_argument("--runs", type=int, help="how many")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to use (safetensors)")
    options = parser.parse_args(argv)
    bench = BENCHES[options.name]
    runs = options.runs or (bench.quick_runs if options.quick else bench.runs)
    print(f"{options.name}: {'quick' if options.quick else 'full'}; {machine()}", flush=True)
    began = time.monotonic()
    try:
        line = bench.run(options.model.absolute(), runs=runs, quick=options.quick)
    except (StackFailed, StockFailed, ChatFailed, LeftBehind, OSError) as error:
        print(f"bench {options.name}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    took_s = round(time.monotonic() - began, 1)
    print(json.dumps({"bench": options.name, **line, "runs": runs, "quick": options.quick, "took_s": took_s}))
    return 0


def machine() -> str:
    """What it ran on, and when."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {memory_gib:.0f} GiB, {platform.machine()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
