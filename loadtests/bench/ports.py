"""Ports for a stack of its own."""

from __future__ import annotations

import random
import socket

EPHEMERAL = 32_768
"""Linux gives ports from here on to outgoing connections; ours lie below."""


class NoFreePorts(OSError):
    """So many ports in a row are not free."""


def free(count: int) -> int:
    """The first of `count` ports in a row that are free on the loopback interface just now."""
    for _ in range(1000):
        first = random.randrange(20_000, EPHEMERAL - count)
        if all(_is_free(first + n) for n in range(count)):
            return first
    raise NoFreePorts(f"no {count} free ports in a row between 20000 and {EPHEMERAL}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
