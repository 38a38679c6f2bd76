"""`POST /v1/chat/completions`: what is particular to chats.

Media must be in the request itself (`data:` URLs): an engine that fetched addresses for callers would reach what they
can't. Tensors are never taken.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from app.errors import RequestInvalid
from app.openai.body import Endpoint, Fields, decoded, given
from app.openai.fields import CHAT as FIELDS
from engines.model import RequestDefaults

_MEDIA: Final = ("image_url", "audio_url", "video_url", "input_image")
_TENSORS: Final = ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil")
_INSTRUCTING: Final = frozenset({"system", "developer"})
_TEMPLATE_KEYS: Final = ("chat_template", "tokenize", "tokenizer", "messages", "conversation", "model_config")
MOST_PARTS: Final = 4096
"""Of all messages' contents together; each is looked at in Python, whose time all callers of a gateway share."""


class _Message(Struct):
    role: str
    content: Raw = Raw(b"null")


_messages: Final = msgspec.json.Decoder(list[_Message])
_parts: Final = msgspec.json.Decoder(list[dict[str, Any] | str])
_kwargs: Final = msgspec.json.Decoder(dict[str, Raw] | None)


def _prompts(fields: Fields) -> int:
    if "messages" not in fields:
        raise RequestInvalid("`messages` is missing", "messages")
    messages = decoded(_messages, fields["messages"], "messages")
    if not messages:
        raise RequestInvalid("`messages` must have at least one message", "messages")
    parts = 0
    for number, message in enumerate(messages):
        if bytes(memoryview(message.content)[:1]) == b"[":
            parts += _check_parts(message.content, f"messages[{number}].content", MOST_PARTS - parts)
    if "chat_template_kwargs" in fields:
        kwargs = decoded(_kwargs, fields["chat_template_kwargs"], "chat_template_kwargs") or {}
        for key in _TEMPLATE_KEYS:
            if key in kwargs:
                raise RequestInvalid(f"`chat_template_kwargs.{key}` can't be set", f"chat_template_kwargs.{key}")
    return 1


def _check_parts(content: Raw, name: str, most: int) -> int:
    """Refuse what may not be in a content, or more than `most` parts; returns how many there are."""
    parts = decoded(_parts, content, name)
    if len(parts) > most:
        raise RequestInvalid(f"`{name}`: the messages have more than {MOST_PARTS} content parts", name)
    for number, part in enumerate(parts):
        if isinstance(part, str):
            continue
        where = f"{name}[{number}]"
        kind = part.get("type")
        named = {*part, kind} if isinstance(kind, str) else part.keys()
        for key in _TENSORS:
            if key in named:
                raise RequestInvalid(f"`{where}`: `{key}` is not taken from callers", where)
        for key in _MEDIA:
            if key in named and not _is_inline(part.get("image_url" if key == "input_image" else key)):
                raise RequestInvalid(f"`{where}.{key}` must be a `data:` URL; addresses are not fetched", where)
    return len(parts)


def _is_inline(media: Any) -> bool:
    url = media.get("url") if isinstance(media, dict) else media
    return isinstance(url, str) and url[:5].lower() == "data:"


def _fill(fields: Fields, defaults: RequestDefaults) -> None:
    if defaults.system_prompt is not None:
        fields["messages"] = _with_system_prompt(fields["messages"], defaults.system_prompt)
    if defaults.temperature is not None and not given(fields, "temperature"):
        fields["temperature"] = Raw(msgspec.json.encode(defaults.temperature))
    if defaults.top_p is not None and not given(fields, "top_p"):
        fields["top_p"] = Raw(msgspec.json.encode(defaults.top_p))
    if defaults.max_tokens is not None and not given(fields, "max_tokens", "max_completion_tokens"):
        fields["max_completion_tokens"] = Raw(msgspec.json.encode(defaults.max_tokens))


def _with_system_prompt(raw: Raw, prompt: str) -> Raw:
    """The messages behind a system prompt, unless they bring one."""
    if any(message.role in _INSTRUCTING for message in _messages.decode(raw)):
        return raw
    system = msgspec.json.encode({"role": "system", "content": prompt})
    return Raw(b"[" + system + b"," + bytes(raw)[1:])


CHAT: Final = Endpoint(name="chat", path="/v1/chat/completions", fields=FIELDS, prompts=_prompts, fill=_fill)
