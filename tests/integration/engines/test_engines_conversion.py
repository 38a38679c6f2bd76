"""The converter as a process: what it says, what it refuses, and that it dies with whoever asked. It is met for real in
`test_engines_convert_vllm`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from engines.conversion import Step, convert
from engines.errors import ModelInvalid, SpecInvalid


def program(path: Path, script: str) -> Path:
    """A stand-in for the engine environment's Python."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_without_an_engine_environment_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"^m\.gguf: converting GGUF needs the engine environment"):
        await convert(tmp_path / "gone", tmp_path / "m.gguf", tmp_path / "out", lambda _: None)


async def test_the_converters_own_line_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelInvalid, match=r"^m\.gguf: is not a GGUF file$"):
        await convert(Path(sys.executable), tmp_path / "m.gguf", tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()


async def test_a_converter_that_dies_or_writes_nothing_is_a_refusal(tmp_path: Path) -> None:
    for script, reason in (("kill -9 $$", "status -9"), ("exit 0", "status 0")):
        python = program(tmp_path / "python", script)
        with pytest.raises(ModelInvalid, match=reason):
            await convert(python, tmp_path / "m.gguf", tmp_path / "out", lambda _: None)


async def test_steps_are_reported_and_other_lines_are_not(tmp_path: Path) -> None:
    python = program(
        tmp_path / "python", """echo noise; echo '{"step":"write","number":3,"of":4,"says":"writing"}'; mkdir "$3" """
    )
    steps: list[Step] = []
    await convert(python, tmp_path / "m.gguf", tmp_path / "out", steps.append)
    assert steps == [Step("write", 3, 4, "writing")]


async def test_i10_a_cancelled_conversion_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    python = program(tmp_path / "python", f"""echo $$ > '{pid}'; echo '{{"step":"weights"}}'; exec sleep 60""")
    begun = asyncio.Event()
    task = asyncio.create_task(convert(python, tmp_path / "m.gguf", tmp_path / "out", lambda _: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
