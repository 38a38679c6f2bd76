"""How many engines a pool should have. Pure.

    desired = max(promised, demanded, kept), at most what the operator allows

- promised: ⌈Σ provisioned ÷ slots⌉, always;
- demanded: what holds ask for;
- kept: engines that are there and whose keep-alive isn't over (`keepalive`).

Demanded, in order:

1. nothing waits and no engine is ready: 0, or 1 while an operator's `prewarm` lasts;
2. something waits and no engine is ready: 1. However many requests hold, one start is enough to learn how quickly the
   queue drains: 50 requests on 16 slots are often done before a second engine could have started;
3. nothing waits, or an engine is on its way, or the ready ones have slots for everything: as many as that takes, of
   those that there are. What a start brings is seen before more is asked for;
4. at the speed measured since its watching began, the queue drains before another engine could start: the ready ones;
5. otherwise one more.

The speed in 4 needs some time to be known: `OBSERVE_S`, or a start's length if that is longer.
"""

from __future__ import annotations

from typing import Final

from engines.demand import PoolTotals
from engines.pools import PoolConfig, PoolHistory

OBSERVE_S: Final = 5.0
"""How long a queue is watched before its speed is believed. On a small machine a wave of requests takes seconds."""


def promised(config: PoolConfig, *, most: int) -> int:
    """Engines that the pool's provisioned concurrency needs; `most` is the operator's maximum."""
    return min(_engines_for(config.provisioned, config.slots), most)


def fitting(config: PoolConfig, totals: PoolTotals, *, most: int) -> int:
    """Engines that would have slots for everything that is in the system now."""
    return min(_engines_for(totals.running + totals.waiting, config.slots), most)


def demanded(
    config: PoolConfig, totals: PoolTotals, history: PoolHistory, *, ready: int, pending: int, most: int, now: float
) -> int:
    """Engines that requests (or an operator's `prewarm`) ask for now; the numbers are those of the docstring above."""
    if ready == 0:
        return int(totals.waiting > 0 or now < history.wanted_until)  # 1, 2
    fit = fitting(config, totals, most=most)
    if totals.waiting == 0 or pending or fit <= ready:
        return min(fit, ready + pending)  # 3
    if drains_in_time(totals, history, now):
        return ready  # 4
    return min(ready + 1, most)  # 5


def drains_in_time(totals: PoolTotals, history: PoolHistory, now: float) -> bool:
    """Is the queue expected to be empty before an engine could start, or is it too early to say?

    Speed: requests done since the watching began, and half of those that run as half done, over the time it took.
    For example 34 waiting on 16 slots with answers of 1.5 s: after 5 s 48 are done, so 11 a second, and the rest is
    gone within a start.
    """
    queue = history.queue
    if queue is None or now - queue.at < max(OBSERVE_S, history.start_s):
        return True
    arrived = max(0, totals.arrivals - queue.arrivals)
    done = max(0, queue.in_system + arrived - totals.running - totals.waiting) + totals.running / 2
    return totals.waiting * (now - queue.at) <= done * history.start_s


def _engines_for(slots_wanted: int, slots: int) -> int:
    return -(-slots_wanted // slots)
