"""Turns a GGUF file into a safetensors folder in a process of the engine environment, which has the libraries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from engines.errors import ModelInvalid, SpecInvalid

SCRIPT: Final = Path(__file__).parent / "convert.py"


class Step(Struct, frozen=True):
    """One line of the converter: it begins the step `number` of `of`."""

    step: str
    number: int = 0
    of: int = 0
    says: str = ""


async def convert(python: Path, source: Path, folder: Path, report: Callable[[Step], None]) -> None:
    """Write `source` as safetensors into `folder`, which must not exist.

    Raises `ModelInvalid` with the converter's one line if the file can't be converted, `SpecInvalid` if there is no
    engine environment. A cancelled conversion is killed; what it left is in the folder's parent.
    """
    if not python.exists():
        raise SpecInvalid(f"{source.name}: converting GGUF needs the engine environment, and {python} doesn't exist")
    process = await asyncio.create_subprocess_exec(
        str(python),
        str(SCRIPT),
        str(source.absolute()),
        str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder.parent), "TMPDIR": str(folder.parent)},
    )
    assert process.stdout is not None  # noqa: S101 (asked for above)
    assert process.stderr is not None  # noqa: S101
    errors = asyncio.create_task(process.stderr.read())
    try:
        async for line in process.stdout:
            try:
                report(msgspec.json.decode(line, type=Step))
            except msgspec.DecodeError:
                continue
        status = await process.wait()
        complaint = (await errors).decode(errors="replace").strip().splitlines()
    finally:
        errors.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status != 0 or not folder.is_dir():
        reason = complaint[-1] if complaint else f"the converter ended with status {status}"
        reason = reason.removeprefix(f"can't convert {source.absolute()}: ").removeprefix(f"{source.absolute()} ")
        raise ModelInvalid(f"{source.name}: {reason}", field=source.name)
