"""Where an engine fits, and who makes room for it. Pure.

Memory is reserved from PLACED until STOPPED (or ASLEEP); a device never has more reserved than it has (I4). An engine
that drains, stops or has failed still holds its memory: it counts as `coming`, which is worth waiting for but can't be
given out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from engines.errors import DoesNotFit
from engines.lifecycle import HOLDS_MEMORY
from engines.model import Device, DeviceId, Engine, EngineId, EngineState, Footprint

LEAVING: Final = frozenset({EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED})
"""Will give their memory back without anything more being decided."""


def free(devices: Iterable[Device], engines: Iterable[Engine]) -> dict[DeviceId, int]:
    """Bytes of each device that are not reserved; negative where a device has shrunk below what is on it."""
    left = {device.id: device.memory_bytes for device in devices}
    for engine in engines:
        if engine.state in HOLDS_MEMORY and engine.device in left:
            left[engine.device] -= engine.memory_bytes
    return left


def coming(engines: Iterable[Engine]) -> dict[DeviceId, int]:
    """Bytes of each device that engines on their way out will give back."""
    back: dict[DeviceId, int] = {}
    for engine in engines:
        if engine.state in LEAVING:
            back[engine.device] = back.get(engine.device, 0) + engine.memory_bytes
    return back


def fit(need: int, left: Mapping[DeviceId, int]) -> DeviceId | None:
    """The device that has room for `need` bytes and least to spare (by id among equals); `None` if there is none."""
    return min(
        (device for device, size in left.items() if size >= need),
        key=lambda device: (left[device], device),
        default=None,
    )


class Candidate(Struct, frozen=True):
    """An engine that could leave, and when it was last of use."""

    engine: EngineId
    device: DeviceId
    memory_bytes: int
    last_used_at: float


class Eviction(Struct, frozen=True):
    """Which engines make room, and on which device."""

    device: DeviceId
    engines: tuple[EngineId, ...]
    freed: int


def evict(need: int, available: Mapping[DeviceId, int], candidates: Sequence[Candidate]) -> Eviction | None:
    """The least that must leave one device so that `need` bytes fit; `None` if even all the candidates would not do.

    Those longest without use go first; then whoever turns out not to be needed stays. Among devices the one with the
    fewest to leave wins, then the one whose most recently used victim is the oldest.
    """
    choices = [_on(device, need - size, candidates) for device, size in available.items()]
    found = [choice for choice in choices if choice is not None]
    if not found:
        return None
    victims = min(found, key=lambda c: (len(c), max(v.last_used_at for v in c), c[0].device))
    return Eviction(victims[0].device, tuple(v.engine for v in victims), sum(v.memory_bytes for v in victims))


def _on(device: DeviceId, missing: int, candidates: Sequence[Candidate]) -> list[Candidate] | None:
    """The victims on one device, oldest first; `None` if they aren't enough."""
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted((c for c in candidates if c.device == device), key=lambda c: (c.last_used_at, c.engine)):
        if freed >= missing:
            break
        chosen.append(candidate)
        freed += candidate.memory_bytes
    if freed < missing or not chosen:
        return None
    for candidate in reversed(chosen):
        if freed - candidate.memory_bytes >= missing:
            freed -= candidate.memory_bytes
            chosen.remove(candidate)
    return chosen


def check_fits(footprint: Footprint, devices: Sequence[Device]) -> None:
    """Refuse with the arithmetic (`DoesNotFit`) what no device could hold even if it were empty."""
    largest = max(devices, key=lambda device: device.memory_bytes, default=None)
    if largest is not None and footprint.total <= largest.memory_bytes:
        return
    need = (
        f"an engine needs {gigabytes(footprint.total)} (weights {gigabytes(footprint.weights)} + KV cache "
        f"{gigabytes(footprint.kv_cache)} + overhead {gigabytes(footprint.overhead)})"
    )
    if largest is None:
        raise DoesNotFit(f"{need} and no device is known", field="arguments")
    raise DoesNotFit(
        f"{need}; the largest device, {largest.id}, has {gigabytes(largest.memory_bytes)} for engines; "
        "lower kv_cache_bytes or give it more memory",
        field="arguments",
    )


def gigabytes(size: int) -> str:
    """Bytes for people: `1.27 GB`."""
    return f"{size / 1e9:.2f} GB"
