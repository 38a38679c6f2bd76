from __future__ import annotations

import asyncio
import secrets
import sys
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import msgspec
import pytest
from tiny_model import write_model

from app.admin.parts import AdminParts
from engines import commands, queries
from engines.model import DeviceId, Engine, EngineId, EngineSpec, EngineState, ModelDigest, NodeId

Pool: TypeAlias = "asyncpg.Pool[Any]"


async def test_a_workspace_is_made_listed_and_disabled(cli: Any) -> None:
    made = await cli("workspaces", "create", "acme", "--json")
    assert (made.code, made.json["name"]) == (0, "acme")
    assert (await cli("workspaces", "create", "acme")).code == 0
    assert (await cli("workspaces", "list", "--json")).json == {"data": [made.json]}
    assert (await cli("workspaces", "show", "acme", "--json")).json == made.json
    shown = await cli("workspaces", "show", "acme")
    assert "name         acme" in shown.out
    assert "disabled_at  –" in shown.out
    assert (await cli("workspaces", "disable", "acme")).out == "workspace acme is disabled; its keys are refused\n"
    assert (await cli("workspaces", "show", "acme", "--json")).json["disabled_at"] is not None


async def test_in_a_pipe_a_list_is_a_line_an_entry_with_tabs_between(cli: Any) -> None:
    for name in ("a", "b"):
        await cli("workspaces", "create", name)
    lines = (await cli("workspaces", "list")).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a", "b"]


async def test_a_key_is_printed_once_and_alone_and_can_be_revoked(cli: Any, parts: AdminParts) -> None:
    await cli("workspaces", "create", "acme")
    text = (await cli("keys", "create", "acme", "--label", "laptop", "--days", "1")).out.strip()
    caller = await parts.authenticator.authenticate(f"Bearer {text}", now=0)
    assert caller.workspace == "acme"
    (key,) = (await cli("keys", "list", "acme", "--json")).json["data"]
    assert (key["id"], key["label"], key["revoked_at"]) == (caller.key, "laptop", None)
    assert key["expires_at"] is not None
    assert text not in (await cli("keys", "list", "acme")).out
    assert (await cli("keys", "revoke", "acme", caller.key, "--json")).json["revoked_at"] is not None


async def test_what_the_api_refuses_is_one_line_and_exit_1(cli: Any) -> None:
    for arguments, line in (
        (("workspaces", "show", "gone"), "there is no workspace gone"),
        (("workspaces", "create", "Acme"), "name: Expected `str` matching regex"),
        (("workspaces", "show", "a b?c#d"), "there is no workspace a b?c#d"),
        (("workspaces", "show", ".."), "'..' is no name"),
        (("models", "show", "gone"), "model gone does not exist"),
        (("engines", "logs", "gone"), "no engine has an id that ends with gone"),
        (("usage", "--by", "model"), "by: 'model' is none of workspace"),
    ):
        done = await cli(*arguments)
        assert done.code == 1
        assert line in done.err
        assert "\n" not in done.err.strip()


async def test_wrong_usage_is_exit_2(cli: Any) -> None:
    for arguments in (("workspaces",), ("keys", "create"), ("usage", "--csv", "--json"), ("variants", "set", "a", "b")):
        assert (await cli(*arguments)).code == 2


async def test_without_a_server_or_a_key_the_line_says_what_to_do(cli: Any) -> None:
    cli.env["GREENROOM_ADMIN_URL"] = "http://127.0.0.1:9"
    done = await cli("workspaces", "list")
    assert done.code == 1
    assert "can't reach the admin API at http://127.0.0.1:9" in done.err
    assert "is `greenroom up` running?" in done.err
    (cli.data_dir / "admin-key").unlink()
    done = await cli("workspaces", "list")
    assert done.code == 1
    assert "no admin key" in done.err
    assert "GREENROOM_ADMIN_KEY" in done.err


async def test_a_wrong_admin_key_is_refused_and_never_repeated(cli: Any) -> None:
    wrong = f"gra-{'a' * 12}-{'b' * 52}"
    cli.env["GREENROOM_ADMIN_KEY"] = wrong
    done = await cli("workspaces", "list")
    assert done.code == 1
    assert "the admin key is refused" in done.err
    assert wrong not in done.err


async def test_a_model_is_added_listed_and_removed(cli: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a model", shards=True)
    added = await cli("models", "add", "tiny", str(folder), "--json")
    assert (added.code, added.json["name"], added.json["source"]) == (0, "tiny", str(folder))
    again = await cli("models", "add", "tiny", str(folder), "--source", "the same")
    assert again.code == 0
    assert again.out.startswith("model tiny is there: LlamaForCausalLM, 52 parameters, bfloat16\n")
    assert (await cli("models", "list", "--json")).json["data"][0]["digest"] == added.json["digest"]
    assert "model-00003-of-00003.safetensors" in (await cli("models", "show", "tiny")).out
    assert (await cli("models", "remove", "tiny")).out == "model tiny is removed\n"
    assert list((cli.data_dir / "models").iterdir()) == []


async def test_the_same_name_for_another_model_is_refused(cli: Any, tmp_path: Path) -> None:
    await cli("models", "add", "tiny", str(write_model(tmp_path / "one")))
    done = await cli("models", "add", "tiny", str(write_model(tmp_path / "two", fill=1)))
    assert done.code == 1
    assert "model tiny has other content" in done.err


def spoil(folder: Path, how: str) -> Path:
    write_model(folder, shards=how == "shard")
    if how == "weights":
        (folder / "model.safetensors").unlink()
    if how == "shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    if how == "header":
        (folder / "model.safetensors").write_bytes(secrets.token_bytes(7) + b"\xff" + secrets.token_bytes(200))
    if how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if how == "code":
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    return folder


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("weights", "model.safetensors: missing; the folder has no weights"),
        ("shard", "model-00002-of-00003.safetensors: missing; model.safetensors.index.json names it"),
        ("header", "model.safetensors: corrupt header, or no safetensors file"),
        ("pickle", "pytorch_model.bin: pickled weights only"),
        ("code", "tokenizer_config.json: asks for code from the folder"),
    ],
)
async def test_a_bad_model_is_refused_in_one_line_that_names_the_file(
    how: str, line: str, cli: Any, tmp_path: Path
) -> None:
    done = await cli("models", "add", "tiny", str(spoil(tmp_path / "bad", how)))
    assert done.code == 1
    assert done.err.startswith(f"Refused: {line}")
    assert "\n" not in done.err
    assert (await cli("models", "list", "--json")).json == {"data": []}


@pytest.mark.parametrize(
    ("name", "path", "line"),
    [
        ("tiny", "gone", "gone: no such folder or file"),
        ("tiny", "gone.gguf", "gone.gguf: no such folder or file"),
        ("Tiny!", ".", "'Tiny!': a model's name has 1 to 64 characters"),
    ],
)
async def test_what_is_no_model_at_all_is_refused(name: str, path: str, line: str, cli: Any, tmp_path: Path) -> None:
    done = await cli("models", "add", name, str(tmp_path / path))
    assert done.code == 1
    assert line in done.err


async def test_a_gguf_file_without_an_engine_environment_is_refused(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    cli.env["GREENROOM_ENGINE__PYTHON"] = str(tmp_path / "no-python")
    done = await cli("models", "add", "tiny", str(tmp_path / "m.gguf"))
    assert done.code == 1
    assert "m.gguf: converting GGUF needs the engine environment" in done.err
    assert list((cli.data_dir / "models").iterdir()) == []


async def test_warnings_go_to_stderr_and_leave_stdout_to_json(cli: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "odd", config={"architectures": ["NewForCausalLM"]})
    added = await cli("models", "add", "odd", str(folder), "--json")
    assert added.json["architecture"] == "NewForCausalLM"
    assert "warning: config.json: NewForCausalLM is not known to generate text here" in added.err


@pytest.fixture
async def tiny(cli: Any, tmp_path: Path) -> Any:
    await cli("workspaces", "create", "acme")
    await cli("models", "add", "tiny", str(write_model(tmp_path / "tiny")))
    return cli


async def test_a_variant_is_made_changed_and_removed(tiny: Any) -> None:
    made = await tiny(
        "variants", "create", "acme", "bot", "--model", "tiny", "--system-prompt", "Be brief.", "--temperature", "0.5",
        "--idle-timeout", "5", "--provisioned", "1", "--max-num-seqs", "4", "--dedicated", "--json",
    )  # fmt: skip
    assert made.code == 0
    assert made.json["defaults"] == {"system_prompt": "Be brief.", "temperature": 0.5}
    assert made.json["scaling"] == {"idle_timeout_s": 5.0, "provisioned": 1, "max_concurrency": None}
    assert (made.json["arguments"]["max_num_seqs"], made.json["dedicated"]) == (4, True)

    changed = await tiny(
        "variants", "set", "acme", "bot", "--provisioned", "0", "--shared", "--compiled", "--reset",
        "defaults.system_prompt", "--json",
    )  # fmt: skip
    assert changed.json["defaults"] == {"temperature": 0.5}
    assert changed.json["scaling"]["provisioned"] == 0
    assert (changed.json["arguments"]["enforce_eager"], changed.json["dedicated"]) == (False, False)
    assert (await tiny("variants", "show", "acme", "bot", "--json")).json == changed.json
    assert (await tiny("variants", "list", "acme", "--json")).json == {"data": [changed.json]}
    assert (await tiny("variants", "remove", "acme", "bot", "--json")).json == {"workspace": "acme", "name": "bot"}
    assert (await tiny("variants", "list", "acme", "--json")).json == {"data": []}


async def test_a_variant_that_fits_no_device_is_refused_with_the_arithmetic(tiny: Any) -> None:
    done = await tiny("variants", "create", "acme", "bot", "--model", "tiny", "--kv-cache-bytes", "4000000000")
    assert done.code == 1
    assert "an engine needs 4.79 GB (weights 0.00 GB + KV cache 4.00 GB + overhead 0.79 GB)" in done.err


async def test_prewarming_asks_the_controller(tiny: Any, db_pool: Pool) -> None:
    await tiny("variants", "create", "acme", "bot", "--model", "tiny")
    async with db_pool.acquire() as connection:
        heard: list[str] = []
        listener: Any = lambda *arguments: heard.append(arguments[3])  # noqa: E731
        await connection.add_listener(commands.CHANNEL, listener)
        assert (await tiny("variants", "prewarm", "acme", "bot")).code == 0
        await connection.execute("SELECT 1")
        await connection.remove_listener(commands.CHANNEL, listener)
    assert [commands.decode(payload) for payload in heard] == [commands.Prewarm("acme", "bot")]


@pytest.fixture
async def engines(tiny: Any, db_pool: Pool) -> list[Engine]:
    """One that serves `acme/bot`, one of another pool, one that is over."""
    pool = (await tiny("variants", "create", "acme", "bot", "--model", "tiny", "--json")).json["pool"]
    epoch = await queries.raise_epoch(db_pool)
    spec = EngineSpec(model_digest=ModelDigest("a" * 64))
    mine, other, over = (
        Engine(
            id=EngineId(str(UUID(int=(0x0189_0000_0000_7000_8000 << 48) + number))),
            pool=pool if number == 0xA1 else spec.pool,
            spec=spec,
            state=EngineState.PLACED,
            since=1.0,
            node=NodeId("n"),
            device=DeviceId("n/mem"),
            memory_bytes=1_000_000_000,
            epoch=epoch,
            created_at=1.0,
        )
        for number in (0xA1, 0xB2, 0xC2)
    )
    for engine in (mine, other, over):
        await queries.place_engine(db_pool, engine)
    stopped = msgspec.structs.replace(over, state=EngineState.STOPPED, since=2.0)
    await queries.change_engine(db_pool, EngineState.PLACED, stopped, epoch=epoch)
    return [mine, other, stopped]


async def test_engines_are_listed_and_stopped_by_the_end_of_their_id(
    tiny: Any, engines: list[Engine], db_pool: Pool
) -> None:
    mine, other, over = engines
    assert [e["id"] for e in (await tiny("engines", "list", "--json")).json["data"]] == [other.id, mine.id]
    assert len((await tiny("engines", "list", "--all")).out.splitlines()) == 3
    assert "2 engines have an id that ends with 0" not in (await tiny("engines", "stop", "a1")).err
    assert (await tiny("engines", "stop", over.id)).out == "it is stopped already\n"

    async with db_pool.acquire() as connection:
        heard: list[str] = []
        listener: Any = lambda *arguments: heard.append(arguments[3])  # noqa: E731
        await connection.add_listener(commands.CHANNEL, listener)
        await tiny("engines", "stop", "b2", "--force")
        await tiny("variants", "stop", "acme", "bot")
        await connection.execute("SELECT 1")
        await connection.remove_listener(commands.CHANNEL, listener)
    assert [commands.decode(payload) for payload in heard] == [
        commands.Stop(other.id, force=True),
        commands.Stop(mine.id, force=False),
    ]


async def test_an_engine_that_could_be_two_is_refused(tiny: Any, engines: list[Engine], db_pool: Pool) -> None:
    done = await tiny("engines", "logs", "")
    assert done.code == 1
    assert "2 engines have an id that ends with" in done.err


async def test_logs_are_printed_and_followed_to_the_engines_end(
    tiny: Any, engines: list[Engine], parts: AdminParts
) -> None:
    over = engines[2]
    (parts.logs.folder / over.id).mkdir(parents=True)
    (parts.logs.folder / over.id / "log").write_text("one\ntwo\nthree\n")
    assert (await tiny("engines", "logs", "c2", "-n", "2")).out == "two\nthree\n"
    assert (await tiny("engines", "logs", "c2", "-n", "1", "--follow")).out == "three\n"
    assert (await tiny("engines", "logs", "c2", "-n", "1", "--json")).json["lines"] == ["three"]


async def test_usage_is_summed_as_table_csv_and_json(cli: Any, db_pool: Pool) -> None:
    await db_pool.execute(
        """
        INSERT INTO usage_event (request_id, attempt, final, workspace, key, variant, model, endpoint, stream, outcome,
            source, prompt_tokens, cached_tokens, completion_tokens, cold, received_at, ended_at, queued_us, held_us,
            duration_us, trace_id)
        SELECT gen_random_uuid(), 1, true, 'acme', 'k', 'v' || n, 'tiny', 'chat', true, 'completed', 'stream',
               1000, 10, 5, true, '2026-11-10', '2026-11-10', 0, 0, 0, '' FROM generate_series(1, 501) n
        """
    )
    period = ("--from", "2026-11-01", "--to", "2026-12-01")
    summed = (await cli("usage", "--by", "workspace", *period, "--json")).json
    assert summed == {
        "from": "2026-11-01T00:00:00Z",
        "to": "2026-12-01T00:00:00Z",
        "by": ["workspace"],
        "data": [
            {
                "workspace": "acme",
                "requests": 501,
                "completed": 501,
                "cold": 501,
                "failed_attempts": 0,
                "prompt_tokens": 501_000,
                "cached_tokens": 5_010,
                "completion_tokens": 2_505,
            }
        ],
    }
    assert len((await cli("usage", *period, "--json")).json["data"]) == 501
    assert len((await cli("usage", *period, "--csv")).out.splitlines()) == 502
    line = (await cli("usage", *period, "--variant", "v7")).out.strip().split("\t")
    assert line == ["2026-11-10 00:00", "acme", "v7", "1", "1", "1", "1,000", "10", "5"]


def test_every_command_has_a_help_text_and_json() -> None:
    from click import Group, Option

    from app.cli import greenroom

    missing = []
    for noun in ("workspaces", "keys", "models", "variants", "engines", "usage", "chat"):
        command = greenroom.get_command(None, noun)  # type: ignore[arg-type]
        assert command is not None
        verbs = command.commands.values() if isinstance(command, Group) else [command]
        for verb in verbs:
            options = {name for parameter in verb.params if isinstance(parameter, Option) for name in parameter.opts}
            if not verb.help or "--json" not in options:
                missing.append(f"{noun} {verb.name}")
    assert missing == []


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("workspaces", "create", "acme"), 0, ""),
        (("workspaces", "show", "gone"), 1, "greenroom: there is no workspace gone\n"),
        (("workspaces", "nonsense"), 2, None),
    ],
)
async def test_the_program_ends_with_0_1_or_2(
    arguments: tuple[str, ...], code: int, error: str | None, cli: Any
) -> None:
    program = [sys.executable, "-m", "app", *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*program, env=cli.env, stdout=pipe, stderr=pipe)
    _, said = await process.communicate()
    assert process.returncode == code
    if error is not None:
        assert said.decode() == error
