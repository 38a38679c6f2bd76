"""Whether what is promised as provisioned concurrency can be kept: all of it at once, on the devices there are. Pure.

A pool needs ceil(Σ provisioned of its variants ÷ slots) engines at all times. They are laid onto the devices largest
first, each where the least room would be left: not the best packing that exists, so a promise that only just fits may
be refused, but one that is accepted can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from engines import footprint, placement
from engines.errors import DoesNotFit
from engines.model import Device, PoolId, Variant


def check_promises(
    variants: Iterable[Variant], changed: Variant, devices: Sequence[Device], max_engines_per_pool: int
) -> None:
    """Refuse (`DoesNotFit`) provisioned concurrency that can't be kept beside what the other variants were promised.

    `variants` are all others; `changed` is the one that is asked for.
    """
    if changed.scaling.provisioned == 0:
        return
    pools: dict[PoolId, list[Variant]] = {}
    for variant in (*variants, changed):
        if variant.scaling.provisioned:
            pools.setdefault(variant.spec.pool, []).append(variant)
    engines = {pool: math.ceil(sum(v.scaling.provisioned for v in of) / of[0].spec.slots) for pool, of in pools.items()}
    mine = engines[changed.spec.pool]
    promised = f"provisioned concurrency {changed.scaling.provisioned}"
    if mine > max_engines_per_pool:
        reason = f"{promised} needs {mine} engines of its pool and at most {max_engines_per_pool} are allowed"
        raise DoesNotFit(f"{reason}; lower it, or raise arguments.max_num_seqs", field="scaling.provisioned")
    sizes = {pool: footprint.estimate(of[0].model, of[0].arguments).total for pool, of in pools.items()}
    if not _all_fit(engines, sizes, devices):
        wanted = sum(count * sizes[pool] for pool, count in engines.items())
        there = sum(device.memory_bytes for device in devices)
        reason = f"{promised} can't be kept beside what others were promised: all of it needs "
        reason += f"{sum(engines.values())} engines with {placement.gigabytes(wanted)}; "
        raise DoesNotFit(f"{reason}the devices have {placement.gigabytes(there)}", field="scaling.provisioned")


def _all_fit(engines: Mapping[PoolId, int], sizes: Mapping[PoolId, int], devices: Sequence[Device]) -> bool:
    left = {device.id: device.memory_bytes for device in devices}
    for pool in sorted(engines, key=lambda pool: (-sizes[pool], pool)):
        for _ in range(engines[pool]):
            device = placement.fit(sizes[pool], left)
            if device is None:
                return False
            left[device] -= sizes[pool]
    return True
