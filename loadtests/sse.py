"""Reads a streamed OpenAI completion line by line and remembers when what arrived.

The reader owns no connection and no clock: it is given a `readline` that returns as soon as one line is there (Locust's
`r.stream.readline(b"\\n")`, `http.client`'s `response.readline`; not `FastHttpUser.iter_lines`, which waits for 1,024
bytes and so reports the first token when many have come), and a `clock` in seconds. All times are on that clock.

A chunk is one `data:` event with a choice that carries text, reasoning text or tool calls. Comments (`: loading …`) and
the first chunk with a role and empty content are no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

DONE = b"[DONE]"


class Delta(Struct):
    """The part of a chat chunk's choice that carries what the model made."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(Struct):
    """A choice of a chunk: `delta` in chats, `text` in completions."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        """The text in it, of whatever kind."""
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning or self.delta.reasoning_content or ""

    @property
    def carries_tokens(self) -> bool:
        """Whether the model made something that is in this chunk."""
        return bool(self.content or (self.delta is not None and self.delta.tool_calls))


class Usage(Struct):
    """Token counts of a chunk or of the whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Event(Struct):
    """What is looked at of one `data:` event."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass
class Stream:
    """What a stream contained, and when it arrived."""

    arrivals: list[float] = field(default_factory=list)
    """One entry for each chunk that carries tokens."""
    finished: float | None = None
    """The last chunk with a finish reason."""
    ended: float | None = None
    """`[DONE]`, or the end of the body without it."""
    tokens: int | None = None
    """The engine's own count, from the usage chunk; `None` if there was none."""
    comments: int = 0
    text: str = ""
    failure: str | None = None
    """Why the stream did not end well; `None` if it did. Never content."""

    @property
    def completion_tokens(self) -> int:
        """The engine's count, else the number of chunks."""
        return len(self.arrivals) if self.tokens is None else self.tokens

    def first_token_s(self, start: float) -> float | None:
        """TTFT: from `start` to the first chunk that carries tokens."""
        return self.arrivals[0] - start if self.arrivals else None

    def inter_token_s(self) -> float | None:
        """ITL as guidellm and aiperf define it: (last − first) ÷ (tokens − 1), over tokens; `None` for less than two.

        The finish reason counts as the last arrival: the end-of-text token has no chunk of its own.
        """
        if not self.arrivals or self.completion_tokens < 2:
            return None
        last = max(self.arrivals[-1], self.finished or 0.0)
        return (last - self.arrivals[0]) / (self.completion_tokens - 1)

    def gaps_s(self) -> list[float]:
        """ICL: the raw gaps between chunks; a chunk may carry several tokens."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def read(readline: Callable[[], bytes], clock: Callable[[], float]) -> Stream:
    """Read to the end of the body. What `readline` raises goes to the caller; everything else is in `Stream.failure`.

    A stream fails that has an error frame (also if `[DONE]` follows: engines that die send both), an event that isn't
    a JSON object, no `[DONE]`, events after it, or no finish reason.
    """
    stream = Stream()
    done = False
    for at, data in _events(readline, clock, stream):
        if done:
            stream.failure = stream.failure or "events after [DONE]"
        elif data == DONE:
            done = True
            stream.ended = at
        else:
            _take(stream, data, at)
    if not done:
        stream.ended = clock()
        stream.failure = stream.failure or "no [DONE]"
    elif stream.finished is None:
        stream.failure = stream.failure or "no finish reason"
    return stream


def _events(readline: Callable[[], bytes], clock: Callable[[], float], stream: Stream) -> Iterator[tuple[float, bytes]]:
    """Arrival of the first line and data of each event; comments are counted in `stream`."""
    lines: list[bytes] = []
    at = 0.0
    while line := readline():
        line = line.rstrip(b"\r\n")
        if line.startswith(b":"):
            stream.comments += 1
        elif line.startswith(b"data:"):
            at = at if lines else clock()
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            yield at, b"\n".join(lines)
            lines = []
    if lines:
        stream.failure = stream.failure or "cut inside an event"


def _take(stream: Stream, data: bytes, at: float) -> None:
    try:
        event = msgspec.json.decode(data, type=Event)
    except msgspec.DecodeError:
        stream.failure = stream.failure or "an event that is no completion chunk"
        return
    if event.error is not None:
        stream.failure = stream.failure or f"error frame: {_code(event.error)}"
        return
    if any(choice.carries_tokens for choice in event.choices):
        stream.arrivals.append(at)
        stream.text += "".join(choice.content for choice in event.choices)
    if any(choice.finish_reason for choice in event.choices):
        stream.finished = at
    if event.usage is not None:
        stream.tokens = event.usage.completion_tokens


def _code(error: Any) -> str:
    """The error's code or type, so that failures of one kind are counted together."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "unnamed")
    return "unnamed"
