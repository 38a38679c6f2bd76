"""Turns a GGUF file into the safetensors folder that engines serve.

Runs in the engine environment, by itself:

    .venv-engine/bin/python engines/convert.py FILE.gguf FOLDER [--license FILE]

The weights are de-quantised to bfloat16; tokenizer, chat template and configuration come out of the GGUF file as well.
FOLDER appears whole or not at all. Progress goes to stdout, one JSON object a line:

    {"step": "weights", "of": 4, "number": 2, "says": "reading the weights", "seconds": 9.1}

and last {"step": "done", "path": FOLDER, "bytes": N, "seconds": 20.3}. With `--text` the same lines are for people. A
file that can't be converted is one line on stderr and exit status 1. Nothing is looked up anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Started as a file, Python looks for modules beside it first, and `packaging` there isn't the one that torch means.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAGIC = b"GGUF"
STEPS = 4


class Progress:
    """Says on stdout what is being done, and how long the whole has taken so far."""

    def __init__(self, *, text: bool) -> None:
        self._text = text
        self._start = time.monotonic()
        self._number = 0

    def step(self, name: str, says: str) -> None:
        """The next step begins."""
        self._number += 1
        facts = {"step": name, "number": self._number, "of": STEPS, "says": says}
        self._print(facts, f"[{self._number}/{STEPS}] {says} …")

    def done(self, path: Path, size: int) -> None:
        """All is done."""
        self._print({"step": "done", "path": str(path), "bytes": size}, f"wrote {path} ({size / 1e6:.0f} MB)")

    def _print(self, facts: dict[str, Any], says: str) -> None:
        seconds = round(time.monotonic() - self._start, 1)
        line = f"  {seconds:5.1f} s  {says}" if self._text else json.dumps(facts | {"seconds": seconds})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def convert(source: Path, folder: Path, progress: Progress, license_file: Path | None) -> int:
    """Write the folder and return its size in bytes. `folder` must not exist; `ValueError` says what is wrong."""
    if folder.exists():
        raise ValueError(f"{folder} is there already")
    with source.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{source} is not a GGUF file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(source, partial, progress)
        if license_file is not None:
            shutil.copyfile(license_file, partial / "LICENSE")
        _open_up(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(path.stat().st_size for path in folder.iterdir())


def _write(source: Path, folder: Path, progress: Progress) -> None:
    progress.step("import", "loading PyTorch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name = source.name
    progress.step("weights", "reading and de-quantising the weights")
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    progress.step("write", "writing safetensors")
    model.save_pretrained(folder)
    progress.step("tokenizer", "building the tokenizer")
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=name).save_pretrained(folder)


def _open_up(folder: Path) -> None:
    """Give directory and files the modes that the umask asks for; safetensors writes 0600 whatever it says."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def main(arguments: list[str]) -> int:
    """Convert one file; the exit status."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to a safetensors folder.")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--license", type=Path, help="a file to put into the folder as LICENSE")
    parser.add_argument("--text", action="store_true", help="progress for people, not JSON")
    given = parser.parse_args(arguments)
    progress = Progress(text=given.text)
    try:
        size = convert(given.source, given.folder, progress, given.license)
    except Exception as error:  # transformers raises anything on a broken file
        says = str(error).strip().splitlines()
        sys.stderr.write(f"can't convert {given.source}: {says[0] if says else type(error).__name__}\n")
        return 1
    progress.done(given.folder, size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
