from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from app.children import Child, engine_environ, environ_of, rotate, spawn
from app.settings import EngineSettings, GatewaySettings, Settings, load


def never() -> subprocess.Popen[bytes]:
    raise AssertionError("this test starts nothing")


def deaths(child: Child, *times: tuple[float, float]) -> list[float]:
    """Wait after each life, given as (started, died)."""
    waits = []
    for started, died in times:
        child._started_at = started
        waits.append(round(child.died(died), 3))
    return waits


def test_a_child_that_keeps_dying_waits_longer_each_time_up_to_a_bound() -> None:
    lives = [(float(n), n + 0.5) for n in range(10)]
    assert deaths(Child("gateway-0", never), *lives) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]


def test_a_child_that_lived_half_a_minute_starts_again_at_once() -> None:
    assert deaths(Child("gateway-0", never), (0, 1), (1, 2), (2, 40), (40, 41)) == [0.1, 0.2, 0.1, 0.1]


def test_settings_survive_the_way_through_an_environment() -> None:
    settings = Settings(
        data_dir="/a path/with = signs",
        pepper="p3pp3r",
        gateway=GatewaySettings(port=1234, drain_s=0.5, count=3),
        engine=EngineSettings(start="spawn", launcher="memory"),
    )
    environ = environ_of(settings, {"PATH": "/bin", "GREENROOM_GATEWAY__PORT": "1", "GREENROOM_LOG_LEVEL": "debug"})
    assert environ["PATH"] == "/bin"
    assert load(environ) == settings


def test_i11_the_engine_hosts_environment_has_nothing_of_ours_and_no_secret() -> None:
    environ = {
        "PATH": "/bin",
        "HOME": "/root",
        "GREENROOM_PEPPER": "x",
        "PGPASSWORD": "x",
        "HF_TOKEN": "x",
        "LANG": "C",
    }
    assert engine_environ(environ) == {"PATH": "/bin", "HOME": "/root", "LANG": "C"}


def test_a_childs_output_goes_to_its_log_and_is_rotated(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        assert spawn([sys.executable, "-c", "print('x' * 100)"], {}, log=log).wait() == 0
    assert log.stat().st_size == 202
    assert log.stat().st_mode & 0o777 == 0o600
    rotate(log, limit=500)
    assert log.stat().st_size == 202
    rotate(log, limit=200)
    assert (log.stat().st_size, (tmp_path / "log.1").stat().st_size) == (0, 202)


def test_a_child_is_in_a_session_of_its_own_and_inherits_only_what_it_is_given(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os; print(os.getpid() == os.getsid(0), sorted(os.listdir('/proc/self/fd')))"
    with (tmp_path / "given").open("w") as given, (tmp_path / "kept").open("w"):
        spawn([sys.executable, "-c", code], {}, log=log, inherit=[given.fileno()]).wait()
        fds = sorted(["0", "1", "2", str(given.fileno())])
    said, _, listed = log.read_text().partition(" ")
    assert said == "True"
    assert set(fds) <= set(eval(listed))
    assert len(eval(listed)) == 5  # and the one that lists them
