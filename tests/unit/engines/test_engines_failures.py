"""What callers are told when an engine can't be started."""

from __future__ import annotations

import pytest

from engines import failures


@pytest.mark.parametrize(
    ("reason", "lines", "hint"),
    [
        ("exit status 1", (), "the model could not be loaded"),
        ("killed by SIGKILL", (), "the engine was killed while loading the model; memory may be short"),
        ("killed by SIGKILL", ("MemoryError",), "the engine was killed while loading the model; memory may be short"),
        ("the engine host at /run/host.sock is away: gone; waited 60 s for it", (),
         "the engine host could not start an engine"),
        ("the files of model m are not in the model store: /x is no folder", (), "the model's files are missing"),
        ("exit status 1", ("RuntimeError: DefaultCPUAllocator: can't allocate memory: cannot allocate memory",),
         "the engine ran out of memory while loading the model"),
        ("exit status 1", ("ValueError: … GiB KV cache is needed, which is larger than the available KV cache memory",),
         "the model's context does not fit its KV cache"),
        ("exit status 1", ("SafetensorError: Error while deserializing header: HeaderTooLarge", "Traceback"),
         "the model's weights could not be read"),
        ("no progress for 300 s in phase weights", (), "the engine made no progress while starting"),
        ("exit status 1", ("Loading safetensors checkpoint shards: 100%", "/secret/path is bad"),
         "the model could not be loaded"),
    ],
)  # fmt: skip
def test_hints_name_the_cause_and_nothing_of_the_machine(reason: str, lines: tuple[str, ...], hint: str) -> None:
    assert failures.hint(reason, lines) == hint
