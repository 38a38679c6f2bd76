"""What belongs to an engine, found from outside."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.host.layout import Layout
from engines.launchers import local_remains
from engines.launchers.local_remains import Leader
from engines.launchers.local_watch import _Stamp, durations_us
from engines.model import EngineId

ENGINE = EngineId("01926b3e-5f00-7000-8000-0123456789ab")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(
        directory=tmp_path / "engines" / ENGINE,
        run=local_remains.run_directory(tmp_path, "0123abcd", ENGINE),
    )
    made.make()
    return made


@pytest.fixture
def process(layout: Layout) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own whose output is the engine's log."""
    with layout.log.open("ab") as log:
        made = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], stdout=log, stderr=log, start_new_session=True
        )
    yield made
    made.kill()
    made.wait()


def test_a_runtime_directory_is_named_for_its_installation_and_engine(layout: Layout) -> None:
    assert layout.run.name == "0123abcd-0123456789ab"


def test_a_noted_leader_is_read_again(layout: Layout) -> None:
    leader = Leader(engine=ENGINE, pid=17, pid_start=4711, asked_us=5)
    assert local_remains.read_leader(layout.run) is None
    local_remains.write_leader(layout, leader)
    assert local_remains.read_leader(layout.run) == leader
    (layout.run / "pid").write_text("{")
    assert local_remains.read_leader(layout.run) is None


def test_an_engine_is_found_by_its_log(layout: Layout, process: subprocess.Popen[bytes]) -> None:
    engines = layout.directory.parent
    assert local_remains.processes_by_log(engines) == {ENGINE: {process.pid}}
    leader = local_remains.find_leader(engines, ENGINE)
    assert leader is not None and leader.pid == process.pid
    layout.log.unlink()
    assert local_remains.processes_by_log(engines) == {ENGINE: {process.pid}}
    assert local_remains.installed_engines(layout.run.parents[1], "0123abcd", engines) == {layout.run: ENGINE}
    assert local_remains.installed_engines(layout.run.parents[1], "ffffffff", engines) == {}


def test_an_engine_is_found_by_its_log_through_a_link(
    tmp_path: Path, layout: Layout, process: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "link").symlink_to(layout.directory.parent)
    assert local_remains.processes_by_log(tmp_path / "link") == {ENGINE: {process.pid}}


def test_a_process_is_killed_by_its_log_and_then_nobody_is_there(
    layout: Layout, process: subprocess.Popen[bytes]
) -> None:
    assert local_remains.kill_by_log(layout.directory.parent, ENGINE) == 1
    assert process.wait() == -9
    assert local_remains.kill_by_log(layout.directory.parent, ENGINE) == 0
    assert local_remains.find_leader(layout.directory.parent, ENGINE) is None


@pytest.mark.parametrize("name", ["psm_../../../etc/passwd", "/etc/passwd", "../etc/passwd", "notes", ""])
def test_a_name_that_no_library_makes_is_never_removed(
    layout: Layout, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layout.run / "shm").write_text(f"{name}\n")
    assert local_remains._noted(layout.run) == set()


def test_a_removed_name_is_not_noted(layout: Layout) -> None:
    name = f"psm_{os.getpid()}_noted"
    path = local_remains.SHARED_MEMORY / name
    with path.open("w"):
        assert name in local_remains.shared_memory([os.getpid()])
        path.unlink()
        assert name not in local_remains.shared_memory([os.getpid()])


def test_a_semaphore_is_found_although_the_kernel_calls_it_deleted() -> None:
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    name = "sem." + semaphore._semlock.name.removeprefix("/")  # type: ignore[attr-defined]
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert [line for line in maps if "/dev/shm/sem." in line and line.endswith("(deleted)")]
    assert name in local_remains.shared_memory([os.getpid()])


def test_phases_take_from_the_end_of_the_one_before() -> None:
    stamps = (_Stamp("fork", 1_020), _Stamp("config", 1_500), _Stamp("init", 4_000), _Stamp("weights", 2_000))
    assert durations_us(stamps, 1_000) == {"fork": 20, "config": 480, "weights": 500, "init": 2_000}


def test_a_phase_of_several_workers_ends_with_the_last() -> None:
    assert durations_us((_Stamp("fork", 10), _Stamp("weights", 50), _Stamp("weights", 70)), 0)["weights"] == 60


def test_the_first_phase_has_no_length_if_nobody_knows_when_it_began() -> None:
    assert durations_us((_Stamp("fork", 10), _Stamp("config", 30)), None) == {"config": 20}
