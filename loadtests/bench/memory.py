"""Memory of an idle system: with nothing loaded, and with two engines of different pools that wait for requests.

RSS counts a shared page in every process that maps it; PSS counts it once in all, so only PSS may be added up.
`private` is what would be free if that process alone ended; `shared` is mapped by others too: between the engine host
and what it forked these are the pages of imported code and data that nobody has written to since.
"""

from __future__ import annotations

import http.client
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.bench import processes
from loadtests.bench.chat import ask
from loadtests.bench.processes import Memory
from loadtests.bench.stack import Stack

MIB = 1 << 20
SETTLE_S = 3.0
ENGINE = "engine"
VARIANTS = {
    "short": {"scaling": {"idle_timeout_s": 3600}, "arguments": {"max_model_len": 1024}},
    "long": {"scaling": {"idle_timeout_s": 3600}, "arguments": {"max_model_len": 2048}},
}
NOTHING = Memory()


@dataclass(frozen=True)
class Share:
    """All processes of one role together."""

    processes: int = 0
    memory: Memory = NOTHING


def run(model: Path, *, runs: int, quick: bool) -> dict[str, Any]:
    """Measure, print the tables, and return the keys of the JSON line; a quick run is no different."""
    del runs, quick
    with Stack() as stack:
        key = stack.set_up(model, VARIANTS)
        time.sleep(SETTLE_S)
        idle = by_role(stack, engine_pids=())
        for variant in VARIANTS:
            ask(http.client.HTTPConnection("127.0.0.1", stack.port, timeout=120), model=variant, key=key)
        engines = [engine["pid"] for engine in stack.engines()]
        time.sleep(SETTLE_S)
        loaded = by_role(stack, engine_pids=engines)
    print(_table("nothing loaded", idle))
    print(_table(f"{len(engines)} idle engines", loaded))
    line = line_of(idle, loaded, engines=len(engines))
    print(
        f"An engine costs {line['engine_cost_mib']} MiB (the system's PSS with engines − without, per engine). "
        f"Its processes have {line['engine_rss_mib']} MiB resident, {line['engine_private_mib']} MiB of it their own; "
        f"{line['engine_shared_mib']} MiB are shared with the engine host, the other engine or each other."
    )
    return line


def by_role(stack: Stack, *, engine_pids: Collection[int]) -> dict[str, Share]:
    """Every process of the stack under its role; an engine's processes are those in its session."""
    found: dict[str, Share] = defaultdict(Share)
    for process in stack.processes():
        memory = processes.memory(process.pid)
        if memory is not None:
            role = ENGINE if process.session in engine_pids else process.role
            found[role] = Share(found[role].processes + 1, found[role].memory + memory)
    return dict(found)


def line_of(idle: dict[str, Share], loaded: dict[str, Share], *, engines: int) -> dict[str, Any]:
    """The keys of the JSON line; memory in MiB, the engines' per engine."""
    engine = loaded.get(ENGINE, Share())
    extra = _total(loaded).memory.pss - _total(idle).memory.pss
    return {
        "idle": _sum(_total(idle)),
        "loaded": _sum(_total(loaded)),
        "idle_roles": {role: _row(share) for role, share in sorted(idle.items())},
        "loaded_roles": {role: _row(share) for role, share in sorted(loaded.items())},
        "engines": engines,
        "engine_cost_mib": _mib(extra / engines),
        "engine_rss_mib": _mib(engine.memory.rss / engines),
        "engine_pss_mib": _mib(engine.memory.pss / engines),
        "engine_shared_mib": _mib(engine.memory.shared / engines),
        "engine_private_mib": _mib(engine.memory.private / engines),
    }


def _total(shares: dict[str, Share]) -> Share:
    return Share(
        sum(share.processes for share in shares.values()), sum((s.memory for s in shares.values()), start=NOTHING)
    )


def _row(share: Share) -> dict[str, int]:
    return {
        "processes": share.processes,
        "rss_mib": _mib(share.memory.rss),
        "pss_mib": _mib(share.memory.pss),
        "shared_mib": _mib(share.memory.shared),
        "private_mib": _mib(share.memory.private),
    }


def _sum(share: Share) -> dict[str, int]:
    """What may be added up over processes that share pages."""
    return {name: value for name, value in _row(share).items() if name in {"processes", "pss_mib", "private_mib"}}


def _mib(size: float) -> int:
    return round(size / MIB)


def _table(title: str, shares: dict[str, Share]) -> str:
    columns = ("processes", "rss_mib", "pss_mib", "shared_mib", "private_mib")
    lines = ["".join([f"{title + ', MiB':<24}", *(f"{column.removesuffix('_mib'):>11}" for column in columns)])]
    for role, share in [*sorted(shares.items(), key=lambda item: -item[1].memory.pss), ("in all", _total(shares))]:
        row = _sum(share) if role == "in all" else _row(share)
        cells = (str(row.get(column, "")) for column in columns)
        lines.append("".join([f"  {role:<22}", *(f"{cell:>11}" for cell in cells)]))
    return "\n".join(lines)
