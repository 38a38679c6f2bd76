"""When requests are due, whatever becomes of the ones before: an open loop.

A closed loop sends the next request when the last has ended, so a slow server is asked less often and its queue is
never seen (coordinated omission). Here users take due times from one schedule; when all are busy the next start is
late, and how late is a measurement like any other.
"""

from __future__ import annotations

import random


class Arrivals:
    """An endless schedule. `start` and the due times are on one clock, in seconds."""

    def __init__(self, *, rate: float, start: float, poisson: bool = False, seed: int = 0) -> None:
        """`rate` per second: evenly spaced, or with exponential gaps of the same mean, reproducible by `seed`."""
        if rate <= 0:
            raise ValueError(f"the arrival rate is {rate} per second; it must be above 0")
        self._rate = rate
        self._start = start
        self._taken = 0
        self._due = start
        self._random = random.Random(seed) if poisson else None

    def take(self) -> float:
        """The next due time; each is given out once. The first is `start`."""
        due = self._due
        self._taken += 1
        if self._random is None:
            self._due = self._start + self._taken / self._rate
        else:
            self._due += self._random.expovariate(self._rate)
        return due
