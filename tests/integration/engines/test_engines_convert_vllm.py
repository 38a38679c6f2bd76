"""`engines/convert.py` as the program that it is, in the engine environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "engines" / "convert.py"


def convert(python: Path, source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, PROGRAM, source, folder], capture_output=True, text=True, check=False, timeout=110)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("content", "says"), [(b"PK\x03\x04", "is not a GGUF file"), (b"GGUF\x03\0\0\0", "can't convert")]
)
def test_a_file_that_cant_be_converted_is_one_line_and_leaves_nothing(
    engine_python: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    done = convert(engine_python, source, tmp_path / "folder")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert all(json.loads(line)["of"] == 4 for line in done.stdout.splitlines())


@pytest.mark.vllm
def test_a_folder_that_is_there_is_not_touched(engine_python: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "folder"
    source.write_bytes(b"GGUF")
    folder.mkdir()
    done = convert(engine_python, source, folder)
    assert (done.returncode, done.stderr) == (1, f"can't convert {source}: {folder} is there already\n")
    assert list(folder.iterdir()) == []
