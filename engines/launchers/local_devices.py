"""What engines can be placed on here: the GPUs that `nvidia-smi` lists, else the host's memory.

Memory of a GPU is what the driver gives to programs (total less its own reserve). GPUs that are split into MIG
instances are listed whole, and GPUs of other makers not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Final

import structlog

from engines.model import HOST_MEMORY, Device, DeviceId, NodeId

QUERY: Final = ("--query-gpu=index,memory.total,memory.reserved", "--format=csv,noheader,nounits")
PATIENCE_S: Final = 20.0
"""The first `nvidia-smi` after boot initialises the driver, which takes seconds."""
SHARE_OF_MEMORY: Final = 0.7
"""Of the host's memory, what engines may reserve if nobody says otherwise."""

log = structlog.get_logger()


async def devices(node: NodeId, memory_bytes: int, *, gpus: bool = True) -> tuple[Device, ...]:
    """The node's devices. `memory_bytes` bounds the host's memory, 0: `SHARE_OF_MEMORY` of it; `gpus`: use them."""
    listed = await _nvidia_smi() if gpus else None
    if listed:
        return parse_gpus(node, listed)
    usable = memory_bytes or int(SHARE_OF_MEMORY * host_memory_bytes())
    return (Device(id=DeviceId(f"{node}/{HOST_MEMORY}"), node=node, memory_bytes=usable),)


def gpu_index(device: DeviceId) -> int | None:
    """Which GPU a device is, by its index on the PCI bus; `None` for the host's memory."""
    name = device.rpartition("/")[2]
    return int(name.removeprefix("gpu")) if name.startswith("gpu") else None


def parse_gpus(node: NodeId, listed: str) -> tuple[Device, ...]:
    """Devices from lines of `index, total, reserved` in MiB; a GPU that doesn't say how much it has is left out."""
    found = []
    for line in listed.splitlines():
        index, _, sizes = line.partition(",")
        total, _, reserved = sizes.partition(",")
        if index.strip().isdecimal() and total.strip().isdecimal():
            own = int(reserved) if reserved.strip().isdecimal() else 0
            device = DeviceId(f"{node}/gpu{int(index)}")
            found.append(Device(id=device, node=node, memory_bytes=(int(total) - own) << 20))
    return tuple(found)


def host_memory_bytes(root: Path = Path("/")) -> int:
    """The host's memory, or what the control group that we run in may have of it."""
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    limits = [int(fields["MemTotal"].split()[0]) << 10]
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such hierarchy, or "max"
            limits.append(int((root / name).read_text()))
    return min(limits)


async def _nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    process = await asyncio.create_subprocess_exec(
        program,
        *QUERY,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.warning("nvidia_smi_failed", error=f"no answer within {PATIENCE_S} s")
        return None
    if process.returncode:
        log.warning("nvidia_smi_failed", status=process.returncode, error=output.decode(errors="replace")[:500])
        return None
    return output.decode(errors="replace")
