"""`greenroom chat` against the fake engine, which speaks as the tenants' side does; keys are the admin API's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_engine import FakeEngine, Script

from app.admin.parts import AdminParts
from tenants.errors import KeyRefused

SERVED = "m-0123456789abcdef"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(tmp_path / "book", SERVED, 8, Script(tokens=3))
    runner = web.AppRunner(engine.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"  # type: ignore[attr-defined]
    yield engine
    await runner.cleanup()


@pytest.fixture
async def acme(cli: Any) -> Any:
    await cli("workspaces", "create", "acme")
    return cli


async def test_one_message_is_answered_with_a_key_that_is_revoked_afterwards(
    acme: Any, engine: Any, parts: AdminParts
) -> None:
    done = await acme("chat", "acme", SERVED, "Hello?", "--url", engine.url)
    assert (done.code, done.out.strip()) == (0, "w0 w1 w2")
    assert "first token after " in done.err
    assert "5 tokens in, 3 out" in done.err
    (asked,) = engine.asked
    used = asked.headers["Authorization"]
    assert used.startswith("Bearer gr-")
    with pytest.raises(KeyRefused, match="revoked"):
        await parts.authenticator.authenticate(used, now=0)
    (key,) = (await acme("keys", "list", "acme", "--json")).json["data"]
    assert (key["label"], key["expires_at"] is not None) == ("greenroom chat", True)


async def test_as_json_the_answer_comes_with_its_numbers(acme: Any, engine: Any) -> None:
    done = await acme("chat", "acme", SERVED, "Hello?", "--url", engine.url, "--max-tokens", "2", "--json")
    answer = done.json
    assert {name: answer[name] for name in ("answer", "cold", "prompt_tokens", "completion_tokens")} == {
        "answer": " w0 w1",
        "cold": False,
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert 0 < answer["first_token_s"] <= answer["total_s"]


async def test_a_conversation_goes_on_with_what_was_said_and_outlives_a_refusal(
    acme: Any, engine: Any, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("gr-mine\n")
    done = await acme(
        "chat", "acme", SERVED, "--url", engine.url, "--key-file", str(tmp_path / "key"), stdin="one\n\ntwo\n"
    )
    assert done.code == 0
    assert [asked.headers["Authorization"] for asked in engine.asked] == ["Bearer gr-mine"] * 2
    assert '"content":"one"' in engine.asked[1].body
    assert '"content":" w0 w1 w2"' in engine.asked[1].body

    engine.script = Script(status=503, message="no engine just now")
    done = await acme("chat", "acme", SERVED, "--url", engine.url, "--key-file", str(tmp_path / "key"), stdin="one\n")
    assert done.code == 0
    assert "no engine just now" in done.err


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (Script(status=400, message="the prompt is too long"), "Refused: the prompt is too long"),
        (Script(error_after=1), "Refused: EngineCore encountered an issue."),
        (Script(drop_after=0), "Refused: can't talk to http://127.0.0.1:"),
    ],
)
async def test_what_goes_wrong_is_one_line_and_exit_1(script: Script, line: str, acme: Any, engine: Any) -> None:
    engine.script = script
    done = await acme("chat", "acme", SERVED, "Hello?", "--url", engine.url)
    assert done.code == 1
    assert done.err.startswith(line)
    (key,) = (await acme("keys", "list", "acme", "--json")).json["data"]
    assert key["revoked_at"] is not None


async def test_bad_ways_to_ask(acme: Any, engine: Any, tmp_path: Path) -> None:
    assert (await acme("chat", "acme", SERVED, "--json")).code == 2
    done = await acme("chat", "acme", SERVED, "hi", "--key-file", str(tmp_path / "gone"))
    assert (done.code, done.err) == (1, f"Refused: {tmp_path / 'gone'}: No such file or directory")
    done = await acme("chat", "gone", SERVED, "hi")
    assert (done.code, done.err) == (1, "NotThere: there is no workspace gone")
