"""The engine's event stream on its way to a client (pure).

An engine sends events (`data:`, a chunk of JSON, a blank line) and ends with `data: [DONE]`. We ask it for the usage
with every chunk (`continuous_usage_stats`), whatever the client asked for, and give it a model name of ours. `Relay`
undoes both: it takes bytes as they come, cut anywhere, and returns the bytes for the client, whole events only, and
together what came together. Chunks are not rebuilt: one partial decode says what the first-level `model` and `usage`
are, slices do the rest, and everything else stays byte for byte. Only where slicing can't be sure is the chunk's first
level put together anew, from the same bytes.

`[DONE]` alone is no success: an engine whose core has died sends an error frame and then `[DONE]`. The error frame is
kept from the client, since what it should be told is not the engine's to say.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec
from msgspec import Raw, Struct

from engines.errors import EngineLost

LARGEST_EVENT: Final = 16 << 20
"""Bytes; an engine that sends a longer event is broken."""

_BLANK: Final = b"\n\n"
_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"
_NOTHING: Final = Raw(b"")


class UsageWanted(Enum):
    """What a client asked to be told of usage."""

    NONE = 0
    LAST = 1
    """`include_usage`: one chunk without choices at the end."""
    EVERY = 2
    """`include_usage` and `continuous_usage_stats`: in every chunk too."""


class EngineUsage(Struct, frozen=True):
    """Tokens of a request so far, as its engine counts them."""

    prompt: int
    cached: int
    completion: int


class EngineError(Struct, frozen=True):
    """An error as an engine words it; `status` is an HTTP status."""

    message: str
    status: int
    param: str | None = None


class Portion(Struct, frozen=True):
    """What came of some bytes: `data` is for the client; `done`: the engine has sent `[DONE]`."""

    data: bytes
    done: bool = False
    error: EngineError | None = None


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Error(Struct):
    message: str = ""
    code: int | str | None = None
    param: str | None = None


class _ErrorBody(Struct):
    error: _Error


class _Chunk(Struct):
    """The first level of a chunk or body, as far as we care; values are slices of it."""

    model: Raw = _NOTHING
    usage: Raw = _NOTHING
    choices: Raw = _NOTHING
    error: Raw = _NOTHING


_chunk: Final = msgspec.json.Decoder(_Chunk)
_usage: Final = msgspec.json.Decoder(_Usage)
_error: Final = msgspec.json.Decoder(_Error)
_error_body: Final = msgspec.json.Decoder(_ErrorBody)
_object: Final = msgspec.json.Decoder(dict[str, Raw])


class Relay:
    """One stream: feed it what the engine sends; keeps the last usage it saw."""

    def __init__(self, *, served: str, shown: str, wanted: UsageWanted) -> None:
        """`served`: the model's name at the engine; `shown`: its name for the client."""
        self._served = msgspec.json.encode(served)
        self._shown = msgspec.json.encode(shown)
        self._wanted = wanted
        self._rest = b""
        self._done = False
        self.usage: EngineUsage | None = None
        self.complete = False
        """`usage` is the final one, of all sequences together."""

    def feed(self, data: bytes) -> Portion:
        """Take the next bytes. `EngineLost` if they are no events; after `done` or an error the rest is ignored."""
        if self._done:
            return Portion(b"", done=True)
        if self._rest:
            data = self._rest + data
        end = data.rfind(_BLANK)
        if end < 0:
            if len(data) > LARGEST_EVENT:
                raise EngineLost("the engine sent an event without an end")
            self._rest = data
            return Portion(b"")
        self._rest = data[end + 2 :]
        return self._events(data[:end].split(_BLANK))

    def _events(self, events: list[bytes]) -> Portion:
        out: list[bytes] = []
        for event in events:
            if not event.startswith(_DATA):
                continue  # a comment: the client gets our own
            payload = event[len(_DATA) :].strip()
            if payload == _DONE:
                self._done = True
                return Portion(b"".join(out), done=True)
            chunk = self._decode(payload)
            if _given(chunk.error):
                self._done = True
                return Portion(b"".join(out), error=_frame(chunk.error))
            shown = self._relay(payload, chunk)
            if shown is not None:
                out += (b"data: ", shown, _BLANK)
        return Portion(b"".join(out))

    def _decode(self, payload: bytes) -> _Chunk:
        try:
            return _chunk.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            raise EngineLost("the engine sent an event that is no JSON object") from None

    def _relay(self, payload: bytes, chunk: _Chunk) -> bytes | None:
        """The chunk for the client; `None` if it isn't for it."""
        if _given(chunk.usage):
            last = bytes(chunk.choices) == b"[]"
            self.usage = _usage_of(chunk.usage)
            self.complete = last
            if self._wanted is UsageWanted.NONE and last:
                return None
            if self._wanted is UsageWanted.NONE or (self._wanted is UsageWanted.LAST and not last):
                payload = without_usage(payload, chunk.usage)
        return renamed(payload, chunk.model, self._served, self._shown)


def answer(body: bytes, *, served: str, shown: str) -> tuple[bytes, EngineUsage | None]:
    """An engine's whole JSON answer for the client, and its usage. `EngineLost` if it is no JSON object."""
    try:
        chunk = _chunk.decode(body)
    except (msgspec.DecodeError, RecursionError):
        raise EngineLost("the engine sent an answer that is no JSON object") from None
    usage = _usage_of(chunk.usage) if _given(chunk.usage) else None
    return renamed(body, chunk.model, msgspec.json.encode(served), msgspec.json.encode(shown)), usage


def error_of(body: bytes, status: int) -> EngineError:
    """What an engine says in the body of an error response; any body will do."""
    try:
        error = _error_body.decode(body).error
    except (msgspec.DecodeError, RecursionError):
        return EngineError(f"the engine answered {status}", status)
    return EngineError(error.message, status, error.param)


def renamed(payload: bytes, model: Raw, served: bytes, shown: bytes) -> bytes:
    """A JSON object with `shown` for its first-level `model`, whose bytes are given as decoded.

    A quoted `"model"` can't be inside a string, where quotes are escaped; so one that is there once is the key.
    """
    if not _given(model):
        return payload
    field = b'"model":' + served
    if payload.count(b'"model"') == 1 and payload.count(field) == 1:
        return payload.replace(field, b'"model":' + shown)
    return _rebuilt({**_object.decode(payload), "model": Raw(shown)})


def without_usage(payload: bytes, usage: Raw) -> bytes:
    """A JSON object without its first-level `usage` (whose bytes are given as decoded)."""
    field = b',"usage":' + bytes(usage)
    if payload.count(b'"usage"') == 1 and payload.count(field) == 1:
        return payload.replace(field, b"")
    return _rebuilt({name: raw for name, raw in _object.decode(payload).items() if name != "usage"})


def _rebuilt(fields: dict[str, Raw]) -> bytes:
    return b"{" + b",".join([b"%b:%b" % (msgspec.json.encode(name), raw) for name, raw in fields.items()]) + b"}"


def _given(raw: Raw) -> bool:
    return bytes(raw) not in {b"", b"null"}


def _usage_of(raw: Raw) -> EngineUsage:
    try:
        usage = _usage.decode(raw)
    except msgspec.DecodeError:
        raise EngineLost("the engine sent a usage that can't be read") from None
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details is not None else 0
    return EngineUsage(usage.prompt_tokens, min(cached, usage.prompt_tokens), usage.completion_tokens or 0)


def _frame(raw: Raw) -> EngineError:
    try:
        error = _error.decode(raw)
    except msgspec.DecodeError:
        return EngineError("the engine sent an error", 500)
    return EngineError(error.message, error.code if isinstance(error.code, int) else 500, error.param)
