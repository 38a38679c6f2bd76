"""Locust itself, headless in a process of its own, against a small server whose delays are known.

The server's sleeps are lower bounds, whatever else the machine does; upper bounds are only ratios between numbers of
one run.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

FIRST_S = 0.15
GAP_S = 0.05
TOKENS = 12
ROOT = Path(__file__).parents[3]


async def chat(request: web.Request) -> web.StreamResponse:
    """What `model` says decides what happens; the answer's tokens are `FIRST_S` and then `GAP_S` apart."""
    body = await request.json()
    model = body["model"]
    if request.headers["Authorization"] != "Bearer gr-test":
        return web.json_response({"error": {"message": "no", "code": "invalid_api_key"}}, status=401)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def send(event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def delta(**fields: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}

    await send(delta(role="assistant", content=""))
    await response.write(b": loading eta=0\n")
    await asyncio.sleep(FIRST_S)
    for number in range(TOKENS):
        await send(delta(content=f"{number} "))
        await asyncio.sleep(GAP_S)
        if number == 1 and model == "cut":
            assert request.transport is not None
            request.transport.abort()
            return response
    if model == "dying":
        await send({"error": {"message": "gone", "type": "server_error", "code": "engine_failed"}})
    else:
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        await send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": TOKENS}})
    if model != "endless":
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


@pytest.fixture
async def server() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def locust(server: str, tmp_path: Path, model: str, *more: str, users: int = 8, key: str = "gr-test") -> Any:
    """Run the locustfile for a few seconds; exit status, Locust's own rows by type, and our report."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--headless"),
        *("--host", server, "--variant", model, "--users", str(users), "--spawn-rate", str(users)),
        *("--run-time", "3s", "--stop-timeout", "20", "--html", "load.html", "--json-file", "load"),
        *("--report", "report.json", *more),
        cwd=tmp_path,
        env=os.environ | {"LOADTEST_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 90)
    assert (tmp_path / "report.json").exists(), output.decode()
    rows = {row["method"]: row for row in json.loads((tmp_path / "load.json").read_text())}
    assert (tmp_path / "load.html").stat().st_size > 0
    assert b"gr-test" not in output
    return process.returncode, rows, json.loads((tmp_path / "report.json").read_text())


async def test_first_token_and_inter_token_times_are_those_of_the_server(server: str, tmp_path: Path) -> None:
    status, rows, report = await locust(server, tmp_path, "support-bot", "--rate", "4")
    assert status == 0
    assert set(rows) == {"E2E", "TTFT", "ITL", "LATE"}
    assert {row["name"] for row in rows.values()} == {"support-bot"}
    assert report["requests"] == rows["E2E"]["num_requests"] >= 4
    assert report["failures"] == 0
    assert rows["E2E"]["total_content_length"] == report["tokens"] == TOKENS * report["requests"]

    first_ms, gap_ms, whole_ms = FIRST_S * 1000, GAP_S * 1000, (FIRST_S + TOKENS * GAP_S) * 1000
    ms = report["ms"]
    assert rows["TTFT"]["min_response_time"] >= first_ms
    assert rows["E2E"]["min_response_time"] >= whole_ms
    # A reader that waits for a full block reports the first token when the last has come, and no time between tokens.
    assert ms["TTFT"]["p50"] < 0.6 * ms["E2E"]["p50"]
    assert ms["ITL"]["p50"] > 0.6 * gap_ms
    assert ms["ITL"]["n"] == report["requests"]
    assert ms["ICL"]["n"] == (TOKENS - 1) * report["requests"]
    assert ms["ICL"]["p50"] > 0.5 * gap_ms


async def test_a_start_that_waits_for_a_free_user_is_late_and_not_forgotten(server: str, tmp_path: Path) -> None:
    # One user needs at least 0.75 s a request but two are due each second: the n-th starts n × 0.25 s late.
    _, rows, report = await locust(server, tmp_path, "support-bot", "--rate", "2", users=1)
    whole_s = FIRST_S + TOKENS * GAP_S
    last = report["requests"] - 1
    assert last >= 2
    assert report["ms"]["late"]["max"] >= last * (whole_s - 0.5) * 1000 * 0.99
    assert rows["LATE"]["num_requests"] == report["requests"]
    assert report["ms"]["TTFT+late"]["max"] > report["ms"]["late"]["max"]


@pytest.mark.parametrize(
    ("model", "key", "reason"),
    [
        ("dying", "gr-test", "error frame: engine_failed"),
        ("endless", "gr-test", "no [DONE]"),
        ("cut", "gr-test", "connection lost"),
        ("support-bot", "gr-wrong", "status 401"),
    ],
)
async def test_a_stream_that_does_not_end_well_is_a_failure(
    server: str, tmp_path: Path, model: str, key: str, reason: str
) -> None:
    status, rows, report = await locust(server, tmp_path, model, "--rate", "4", "--run-time", "1s", key=key)
    assert status == 1
    assert set(rows) == {"E2E", "LATE"}
    assert rows["E2E"]["num_failures"] == report["failures"] == report["requests"] > 0
    assert [text for text in report["failures_by_reason"] if text.startswith(reason)]
    assert len(report["failures_by_reason"]) == 1


async def test_prompts_come_from_a_file_and_processes_share_one_report(server: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("One?\n\nTwo?\n")
    status, rows, report = await locust(
        server, tmp_path, "support-bot", "--rate", "4", "--prompt-file", "prompts", "--processes", "2"
    )
    assert status == 0
    assert report["ms"]["TTFT"]["n"] == report["requests"] == rows["E2E"]["num_requests"] >= 4
