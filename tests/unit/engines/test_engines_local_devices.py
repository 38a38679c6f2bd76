"""Devices: GPUs as nvidia-smi lists them, else the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.launchers import local_devices
from engines.model import Device, DeviceId, NodeId

NODE = NodeId("here")


def gpu(index: int, mib: int) -> Device:
    return Device(id=DeviceId(f"here/gpu{index}"), node=NODE, memory_bytes=mib << 20)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, and no other, on the path; tests write it."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("0, 81559, 551\n1, 81559, 551\n", (gpu(0, 81_008), gpu(1, 81_008))),
        ("0, 24564, [N/A]\n", (gpu(0, 24_564),)),
        ("0, [N/A], [N/A]\n1, 100, 0\n", (gpu(1, 100),)),
        ("No devices were found\n", ()),
        ("", ()),
    ],
)
def test_gpus_have_what_the_driver_leaves_to_programs(listed: str, devices: tuple[Device, ...]) -> None:
    assert local_devices.parse_gpus(NODE, listed) == devices


async def test_listed_gpus_are_the_devices(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho '0, 1000, 24'\n")
    assert await local_devices.devices(NODE, 5) == (gpu(0, 976),)


async def test_gpus_are_not_looked_for_if_nobody_wants_them(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho '0, 1000, 24'\n")
    (device,) = await local_devices.devices(NODE, 5, gpus=False)
    assert device == Device(id=DeviceId("here/mem"), node=NODE, memory_bytes=5)


async def test_an_nvidia_smi_that_fails_means_no_gpus(nvidia_smi: Path) -> None:
    (device,) = await local_devices.devices(NODE, 5)
    assert device.id == "here/mem"


async def test_without_a_limit_seven_tenths_of_the_memory_may_be_reserved() -> None:
    (device,) = await local_devices.devices(NODE, 0, gpus=False)
    assert device.memory_bytes == int(0.7 * local_devices.host_memory_bytes())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 << 10),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 1000 << 10),
        ({"sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 1000 << 10),
    ],
)
def test_the_hosts_memory_is_what_our_control_group_may_have(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in {"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert local_devices.host_memory_bytes(tmp_path) == expected


@pytest.mark.parametrize(("device", "index"), [("here/mem", None), ("here/gpu0", 0), ("a/b/gpu12", 12)])
def test_a_device_names_its_gpu(device: str, index: int | None) -> None:
    assert local_devices.gpu_index(DeviceId(device)) == index
