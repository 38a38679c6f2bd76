"""The local launcher with the real engine host and real vLLM, forked and spawned."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import uuid_utils

from engines import scrape
from engines.arguments import served_name
from engines.books import BookShelf
from engines.launchers import local_remains
from engines.launchers.launcher import Exited, Ready
from engines.launchers.local import LocalLauncher
from engines.model import (
    DeviceId,
    Engine,
    EngineId,
    EngineSpec,
    EngineState,
    Model,
    ModelDigest,
    NodeId,
    RuntimeArguments,
)

HOST = Path(__file__).parents[3] / "engines" / "host" / "__main__.py"
DIGEST = ModelDigest("5e" * 32)
NODE = NodeId("here")
SPEC = EngineSpec(
    model_digest=DIGEST, arguments=RuntimeArguments(max_model_len=512, max_num_seqs=4, kv_cache_bytes=64 << 20)
)
REQUEST = "01926b3e-5f00-7000-8000-000000000001"

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(params=["fork", "spawn"])
def launch(
    request: pytest.FixtureRequest, short_dir: Path, engine_python: Path, demo_model: Path
) -> Iterator[dict[str, Any]]:
    """A running engine host, and the arguments of a launcher for it."""
    run, models = short_dir / "r", short_dir / "models"
    for path in (run, models):
        path.mkdir()
    (models / DIGEST).symlink_to(demo_model)
    command = [
        engine_python,
        HOST,
        "--socket",
        run / "host.sock",
        "--mode",
        request.param,
        "--cache",
        short_dir / "cache",
    ]
    host = subprocess.Popen(command, env={"PATH": os.environ["PATH"]})
    yield {
        "host_socket": run / "host.sock",
        "engines_path": short_dir / "engines",
        "run_path": run,
        "models_path": models,
        "installation": "0123abcd",
        "node": NODE,
        "gpus": False,
    }
    host.terminate()
    host.wait()
    for engine in local_remains.processes_by_log(short_dir / "engines"):
        while local_remains.kill_by_log(short_dir / "engines", engine):
            pass


@pytest.fixture
async def launcher(launch: dict[str, Any]) -> AsyncIterator[LocalLauncher]:
    made = LocalLauncher(**launch)
    yield made
    await made.close()


def model(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    return Model(
        name="smollm2",
        digest=DIGEST,
        architecture=config["architectures"][0],
        weights_bytes=1,
        parameters=1,
        max_model_len=config["max_position_embeddings"],
        kv_bytes_per_token=1,
        dtype="bfloat16",
        source="test",
    )


def engine() -> Engine:
    return Engine(
        id=EngineId(str(uuid_utils.uuid7())),
        pool=SPEC.pool,
        spec=SPEC,
        state=EngineState.PLACED,
        since=0.0,
        node=NODE,
        device=DeviceId("here/mem"),
        memory_bytes=1,
        epoch=1,
        created_at=0.0,
    )


async def chat(address: str) -> dict[str, Any]:
    body = {
        "model": served_name(DIGEST),
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(address)) as session:
        headers = {"X-Request-Id": REQUEST}
        async with session.post("http://engine/v1/chat/completions", json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(local_remains.SHM_PREFIXES)}


async def test_a_real_engine_starts_answers_is_counted_and_leaves_nothing(
    launcher: LocalLauncher, launch: dict[str, Any], demo_model: Path
) -> None:
    before = shared_memory()
    made = engine()
    events = aiter(launcher.events())
    what = await launcher.start(made, model(demo_model))
    ready = await anext(events)
    assert isinstance(ready, Ready), "\n".join(launcher.log_tail(made.id, 200))
    assert set(ready.phases_us) == {"fork", "config", "weights", "init", "listening"}
    usage = (await chat(what.address))["usage"]
    entry = await asyncio.to_thread(BookShelf(launch["engines_path"]).find, REQUEST, 1, 0.0)
    assert entry is not None
    assert (entry.engine, entry.lines) == (made.id, 1)
    assert (entry.prompt, entry.completion) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert await scrape.in_flight(what.address) == 0
    made = msgspec.structs.replace(made, state=EngineState.STOPPING, pid=what.pid, pid_start=what.pid_start)
    await launcher.stop(made, grace_s=10.0)
    assert local_remains.processes_by_log(launch["engines_path"]) == {}
    assert list((launch["run_path"] / "e").iterdir()) == []
    assert shared_memory() <= before


async def test_i10_a_real_engine_that_is_killed_is_reported_and_leaves_nothing(
    launcher: LocalLauncher, launch: dict[str, Any], demo_model: Path
) -> None:
    before = shared_memory()
    made = engine()
    events = aiter(launcher.events())
    what = await launcher.start(made, model(demo_model))
    assert isinstance(await anext(events), Ready)
    os.kill(what.pid, signal.SIGKILL)
    exited = await anext(events)
    assert isinstance(exited, Exited) and exited.reason == "killed by SIGKILL"
    assert exited.last_lines
    await launcher.stop(msgspec.structs.replace(made, pid=what.pid, pid_start=what.pid_start), grace_s=0.0)
    assert local_remains.processes_by_log(launch["engines_path"]) == {}
    assert list((launch["run_path"] / "e").iterdir()) == []
    assert shared_memory() <= before
