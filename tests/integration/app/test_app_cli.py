"""The command line as a program: exit codes, one line for what is refused, and no import of what isn't used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import COMMANDS


def greenroom(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GREENROOM_")}
    command = [sys.executable, "-P", "-m", "app", *arguments]
    return subprocess.run(command, env=clean | env, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_help_names_every_command(tmp_path: Path) -> None:
    done = greenroom("--help", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0
    named = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ") and line[2].isalpha()]
    assert named == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name: str, tmp_path: Path) -> None:
    done = greenroom(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"greenroom {name} " in done.stdout


def test_an_unknown_command_is_wrong_usage(tmp_path: Path) -> None:
    assert greenroom("frobnicate", cwd=tmp_path).returncode == 2


def test_an_unknown_setting_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = greenroom("migrate", cwd=tmp_path, GREENROOM_PROT="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "greenroom: settings: Object contains unknown field `prot`\n"


def test_a_bad_value_in_a_named_file_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[gateway]\nport = 99999\n")
    done = greenroom("--config", "my.toml", "migrate", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "greenroom: settings: Expected `int` <= 65535 - at `$.gateway.port`\n"


def test_what_is_refused_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = greenroom("--data-dir", str(tmp_path / "none"), "migrate", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("greenroom: can't connect to the embedded Postgres (run `greenroom up`): ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_command_imports_nothing_that_serves_http_for_another(tmp_path: Path) -> None:
    heavy = {"litestar", "uvicorn", "opentelemetry"}
    code = f"import sys, app.__main__, app.cli.up; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
