"""`greenroom chat`: talk to a variant through the tenants' side, as a customer would, and see what it took.

Without a key of one's own it makes one that expires by itself, and revokes it in the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import rich_click as click
from msgspec import Struct

from app.cli import http, settings
from app.cli.output import json_option, print_json
from app.refusal import Refused
from app.settings import Settings

KEY_LIFE_S: Final = 86_400.0
SILENCE_S: Final = 120.0
"""Longest silence of the gateway; it sends something at least each minute."""
_MAX_LINE: Final = 1 << 20


class Turn(Struct, frozen=True, kw_only=True):
    """One answer and what it took."""

    answer: str
    cold: bool
    """It waited for an engine to start."""
    first_token_s: float | None
    total_s: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def summary(self) -> str:
        """The same in one line."""
        first = "no token" if self.first_token_s is None else f"first token after {self.first_token_s:.2f} s"
        start = f"an engine started for it, {first}" if self.cold else first
        words = f"{start}; {self.prompt_tokens} tokens in, {self.completion_tokens} out"
        rest = self.total_s - (self.first_token_s or 0.0)
        if self.completion_tokens > 1 and rest > 0:
            words += f", {(self.completion_tokens - 1) / rest:.0f} a second"
        return f"{words}; {self.total_s:.2f} s in all"


class _Delta(Struct, frozen=True):
    content: str | None = None


class _Choice(Struct, frozen=True):
    delta: _Delta = _Delta()


class _Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


@click.command()
@click.argument("workspace")
@click.argument("variant")
@click.argument("message", required=False)
@click.option(
    "--key-file", type=click.Path(path_type=Path), help="A file with a key of the workspace; else one is made."
)
@click.option("--url", help="The tenants' side, such as http://host:8000/v1; the local one if not given.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer.")
@json_option
def chat(
    *,
    workspace: str,
    variant: str,
    message: str | None,
    key_file: Path | None,
    url: str | None,
    as_json: bool,
    max_tokens: int | None,
) -> None:
    """Talk to a variant: one MESSAGE, or line by line until Ctrl-D. Shows cold starts, times and tokens."""
    if as_json and message is None:
        raise click.UsageError("--json needs a MESSAGE")
    tree = settings()
    base = (url or f"http://{tree.gateway.host}:{tree.gateway.port}/v1").rstrip("/")
    body: dict[str, Any] = {"model": variant} | ({"max_tokens": max_tokens} if max_tokens else {})
    with _key(tree, workspace, key_file) as key:
        if message is not None:
            turn = _ask(base, key, {**body, "messages": [_says("user", message)]}, _quiet if as_json else _print)
            if as_json:
                print_json(turn)
            else:
                click.echo(f"\n\n{turn.summary}", err=True)
            return
        _converse(base, key, body)


def _converse(base: str, key: str, body: dict[str, Any]) -> None:
    """Read lines, answer each with the talk so far, until the end of the input. A refusal ends only its turn."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            continue
        messages.append(_says("user", line))
        try:
            turn = _ask(base, key, {**body, "messages": messages}, _print)
        except Refused as refused:
            click.echo(f"{refused}", err=True)
            messages.pop()
            continue
        messages.append(_says("assistant", turn.answer))
        click.echo(f"\n{turn.summary}\n", err=True)


@contextmanager
def _key(tree: Settings, workspace: str, file: Path | None) -> Iterator[str]:
    """The key in the file, or a new one that is revoked afterwards."""
    if file is not None:
        yield _read(file)
        return
    path = f"/workspaces/{http.part(workspace)}/keys"
    body = {"label": "greenroom chat", "expires_at": datetime.fromtimestamp(time.time() + KEY_LIFE_S, UTC)}
    key = http.run(lambda admin: admin.post(path, body), tree)
    try:
        yield str(key["key"])
    finally:
        http.run(lambda admin: admin.delete(f"{path}/{key['id']}"), tree)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from None


def _ask(base: str, key: str, body: dict[str, Any], say: Callable[[str], None]) -> Turn:
    try:
        return asyncio.run(_stream(base, key, body, say))
    except TimeoutError:
        raise Refused(f"{base} was silent for {SILENCE_S:.0f} s") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise Refused(f"can't talk to {base}: {str(error) or type(error).__name__}") from None


async def _stream(base: str, key: str, body: dict[str, Any], say: Callable[[str], None]) -> Turn:
    """One streamed request; `say` gets the answer as it comes."""
    content = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_S)
    reading = Reading(time.monotonic())
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=_MAX_LINE) as session:
        async with session.post(f"{base}/chat/completions", data=content, headers=headers) as response:
            if response.status != 200:
                raise Refused(_reason(await response.read(), response.status))
            async for line in response.content:
                if text := reading.line(line, time.monotonic()):
                    say(text)
    return reading.turn(time.monotonic())


class Reading:
    """What is known of an answer so far; times are seconds of one clock."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._first: float | None = None
        self._answer = ""
        self._cold = False
        self._usage = _Usage()

    def line(self, line: bytes, now: float) -> str:
        """Take a line of the stream and return the text in it; raises `Refused` if it is an error."""
        self._cold = self._cold or line.startswith(b": loading")
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return ""
        chunk = msgspec.json.decode(data, type=_Chunk)
        if chunk.error is not None:
            raise Refused(str(chunk.error.get("message", "the stream broke off")))
        self._usage = chunk.usage or self._usage
        text = "".join(choice.delta.content or "" for choice in chunk.choices)
        if text and self._first is None:
            self._first = now
        self._answer += text
        return text

    def turn(self, now: float) -> Turn:
        """The whole, once the stream has ended."""
        return Turn(
            answer=self._answer,
            cold=self._cold,
            first_token_s=None if self._first is None else self._first - self._start,
            total_s=now - self._start,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
        )


def _reason(content: bytes, status: int) -> str:
    try:
        return str(msgspec.json.decode(content, type=dict[str, Any])["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the gateway answered {status}"


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _print(text: str) -> None:
    click.echo(text, nl=False)


def _quiet(_text: str) -> None:
    pass
