"""When an engine that nobody needs leaves. Pure.

The k-th engine of a pool is needed whenever more is in the system than k-1 engines have slots for. It leaves when that
was last so `idle_timeout_s` ago, and it has itself been ready for as long. For the first engine this is the plain rule:
no request for `idle_timeout_s`. For the others it means that a pool shrinks engine by engine, each a keep-alive after
the last burst that needed it, whichever of them served it.
"""

from __future__ import annotations

from engines.model import Engine
from engines.pools import PoolConfig, PoolHistory


def idle_timeout_s(config: PoolConfig, history: PoolHistory) -> float:
    """The pool's keep-alive: the longest among the variants in use, or of all while none has been used."""
    return config.idle_timeout_s if history.idle_timeout_s is None else history.idle_timeout_s


def last_needed_at(history: PoolHistory, count: int) -> float:
    """When the pool last needed `count` engines (≥ 1)."""
    if count == 1:
        return history.last_used_at
    return history.needed_at[count - 1] if len(history.needed_at) >= count else history.since


def last_used_at(engine: Engine, history: PoolHistory) -> float:
    """When a ready engine was last of use: its pool's last request, or when it became ready."""
    return max(history.last_used_at, engine.ready_at or engine.since)


def over(engine: Engine, config: PoolConfig, history: PoolHistory, *, count: int, now: float) -> bool:
    """Is the keep-alive of this engine over, if it is to be the one to leave among `count` ready ones?"""
    since = max(engine.ready_at or engine.since, last_needed_at(history, count))
    return now >= since + idle_timeout_s(config, history)
