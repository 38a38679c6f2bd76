"""A request's body: read within its bounds, decoded once, checked, and put together anew for an engine.

The first level is decoded to names and raw values. Values that pass go to the engine byte for byte; ours are set;
names are unique, since one that comes twice is refused: two readers could take different ones. What the engine would
refuse anyway is left to it, except what is cheap to see, since a request may have to start an engine first.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
from litestar.types import HTTPScope, Receive
from msgspec import Raw, Struct

from app.errors import BodyTooLarge, BodyTooSlow, MediaTypeUnsupported, RequestInvalid
from app.openai.fields import Field, Rule, StreamOptions
from engines import arguments
from engines.model import RequestDefaults, Variant
from engines.sse import UsageWanted

Fields = dict[str, Raw]

MOST_FIELDS: Final = 256
"""Names on the first level; each costs Python's time, which all callers of a gateway share. vLLM knows some 70."""

_NULL: Final = b"null"
_EVERY_USAGE: Final = Raw(b'{"include_usage":true,"continuous_usage_stats":true}')


class ClientGone(Exception):
    """The client left before its body was there."""


class Endpoint(Struct, frozen=True):
    """What differs between the routes that generate."""

    name: str
    path: str
    fields: Mapping[str, Field]
    prompts: Callable[[Fields], int]
    """Checks what is asked of the model and says how many prompts it is; raises `RequestInvalid`."""
    fill: Callable[[Fields, RequestDefaults], None]
    """Adds a variant's defaults where the client says nothing."""


class ClientRequest(Struct, frozen=True):
    """A body that has been checked as far as it can be without knowing the variant."""

    endpoint: Endpoint
    model: str
    fields: Fields
    """What may go to an engine."""
    stream: bool
    sequences: int
    """`n` × prompts: the slots it takes."""
    wanted: UsageWanted


# ---------------------------------------------------------------------- reading


def check_media_type(headers: Mapping[bytes, bytes]) -> None:
    """Only plain JSON is taken. Raises `MediaTypeUnsupported`."""
    kind = headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
    if kind != b"application/json":
        raise MediaTypeUnsupported("the body must be JSON: send `Content-Type: application/json`")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in {b"", b"identity"}:
        raise MediaTypeUnsupported("the body must not be compressed: send no `Content-Encoding`")


async def read(receive: Receive, headers: Mapping[bytes, bytes], *, most: int, timeout_s: float) -> bytes:
    """The whole body, at most `most` bytes and `timeout_s` seconds of it.

    Raises `BodyTooLarge`, `BodyTooSlow` or `ClientGone`.
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > most:
        raise BodyTooLarge(f"the body has more than {most} bytes")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                parts.append(message["body"])
                size += len(message["body"])
                if size > most:
                    raise BodyTooLarge(f"the body has more than {most} bytes")
                if not message["more_body"]:
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {timeout_s:g} s") from None


def header_map(scope: HTTPScope) -> dict[bytes, bytes]:
    """A request's headers; of one that comes twice the last."""
    return dict(scope["headers"])


# ---------------------------------------------------------------------- checking


class _Name:
    """A name on the first level; each is equal to itself only, so that none that comes twice is lost."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _pairs(body: bytes) -> dict[_Name, Raw]:
    names: list[_Name] = []

    def name(_: type[Any], text: Any) -> _Name:
        if len(names) == MOST_FIELDS:
            raise RequestInvalid(f"the body has more than {MOST_FIELDS} fields")
        names.append(_Name(text))
        return names[-1]

    return msgspec.json.Decoder(_Object, dec_hook=name).decode(body)


_Object: Final = dict[_Name, Raw]


def parse(endpoint: Endpoint, body: bytes) -> ClientRequest:
    """Decode and check a body. Raises `RequestInvalid` that names the field."""
    fields = _decoded(body)
    for name in tuple(fields):
        field = endpoint.fields.get(name)
        if field is not None:
            _apply(field, name, fields)
    if "model" not in fields:
        raise RequestInvalid("`model` is missing: it names the variant to talk to", "model")
    prompts = endpoint.prompts(fields)
    return ClientRequest(
        endpoint=endpoint,
        model=value(endpoint, fields, "model", ""),
        fields=fields,
        stream=bool(value(endpoint, fields, "stream", False)),
        sequences=prompts * (value(endpoint, fields, "n", None) or 1),
        wanted=_usage_wanted(value(endpoint, fields, "stream_options", None)),
    )


def value(endpoint: Endpoint, fields: Fields, name: str, default: Any) -> Any:
    """A field that `parse` has checked, decoded."""
    raw, field = fields.get(name), endpoint.fields[name]
    return default if raw is None or field.decoder is None else field.decoder.decode(raw)


def given(fields: Fields, *names: str) -> bool:
    """Does the client say any of these, and not `null`?"""
    return any(name in fields and bytes(fields[name]) != _NULL for name in names)


def decoded(decoder: msgspec.json.Decoder[Any], raw: Raw, name: str) -> Any:
    """A field's value by a decoder of the caller's. Raises `RequestInvalid`."""
    try:
        return decoder.decode(raw)
    except RecursionError:
        raise RequestInvalid(f"`{name}` is nested too deeply", name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason, _, path = str(error).partition(" - at `$")
        param = f"{name}{path.rstrip('`')}"
        raise RequestInvalid(f"`{param}`: {reason}", param) from None


def _decoded(body: bytes) -> Fields:
    try:
        body.decode()  # raw values are not looked into
        pairs = _pairs(body)
    except UnicodeDecodeError:
        raise RequestInvalid("the body is not UTF-8") from None
    except RecursionError:
        raise RequestInvalid("the body is nested too deeply") from None
    except msgspec.ValidationError:
        raise RequestInvalid("the body must be a JSON object") from None
    except msgspec.DecodeError as error:
        raise RequestInvalid(f"the body is not JSON: {error}") from None
    fields: Fields = {}
    for name, raw in pairs.items():
        if name.text in fields:
            raise RequestInvalid(f"`{name.text[:64]}` comes twice", name.text[:64])
        fields[name.text] = raw
    return fields


def _apply(field: Field, name: str, fields: Fields) -> None:
    if field.rule is Rule.STRIP:
        del fields[name]
    elif field.rule is Rule.REFUSE:
        if bytes(fields[name]) not in field.harmless:
            raise RequestInvalid(f"`{name}` {field.why}", name)
        del fields[name]
    elif field.most_bytes is not None and len(memoryview(fields[name])) > field.most_bytes:
        raise RequestInvalid(f"`{name}` has more than {field.most_bytes} bytes", name)
    elif field.decoder is not None:
        decoded(field.decoder, fields[name], name)


def _usage_wanted(options: StreamOptions | None) -> UsageWanted:
    if options is None or not options.include_usage:
        return UsageWanted.NONE
    return UsageWanted.EVERY if options.continuous_usage_stats else UsageWanted.LAST


# ---------------------------------------------------------------------- composing


def compose(request: ClientRequest, variant: Variant) -> bytes:
    """The body for an engine that serves `variant`. Raises `RequestInvalid` if it could never get its slots."""
    slots = variant.spec.slots
    if request.sequences > slots:
        message = f"{request.sequences} sequences (`n` × prompts) at once are more than the {slots} of this model"
        raise RequestInvalid(message, "n")
    fields = dict(request.fields)
    request.endpoint.fill(fields, variant.defaults)
    fields["model"] = _quoted(arguments.served_name(variant.model.digest))
    fields["cache_salt"] = cache_salt(variant.workspace)
    fields.pop("request_id", None)  # goes as a header
    if request.stream:
        fields["stream_options"] = _EVERY_USAGE
    return b"{" + b",".join([b"%b:%b" % (msgspec.json.encode(name), raw) for name, raw in fields.items()]) + b"}"


@lru_cache(maxsize=10_000)
def cache_salt(workspace: str) -> Raw:
    """Keeps workspaces from sharing cached prompts in an engine: what one has asked must not make another quicker."""
    return _quoted(hashlib.sha256(b"greenroom cache salt\0" + workspace.encode()).hexdigest()[:32])


def _quoted(text: str) -> Raw:
    return Raw(msgspec.json.encode(text))
