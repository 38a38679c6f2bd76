"""`POST /v1/completions`: what is particular to plain completions."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from app.errors import RequestInvalid
from app.openai.body import Endpoint, Fields, decoded, given
from app.openai.fields import COMPLETIONS as FIELDS
from engines.model import RequestDefaults

_prompt: Final = msgspec.json.Decoder(str | list[str | int | list[int]])


def _prompts(fields: Fields) -> int:
    if "prompt" not in fields:
        raise RequestInvalid("`prompt` is missing", "prompt")
    prompt = decoded(_prompt, fields["prompt"], "prompt")
    if isinstance(prompt, str):
        return 1
    if not prompt:
        raise RequestInvalid("`prompt` must not be empty", "prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise RequestInvalid("`prompt` must be a string, strings, token ids, or lists of token ids", "prompt")
    return 1 if kinds == {int} else len(prompt)


def _fill(fields: Fields, defaults: RequestDefaults) -> None:
    for name, value in (
        ("temperature", defaults.temperature),
        ("top_p", defaults.top_p),
        ("max_tokens", defaults.max_tokens),
    ):
        if value is not None and not given(fields, name):
            fields[name] = Raw(msgspec.json.encode(value))


COMPLETIONS: Final = Endpoint(name="completions", path="/v1/completions", fields=FIELDS, prompts=_prompts, fill=_fill)
