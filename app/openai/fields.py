"""Every field of vLLM 0.32's two request models and what becomes of it on the way to an engine.

| rule | |
|---|---|
| pass | goes through byte for byte; where a type stands here it is checked first, so that a wrong one costs no start |
| set | ours, whatever the client says |
| strip | taken out without a word: it does nothing here, or nothing that a tenant may decide |
| refuse | 400 that names it, unless its value is `null` or one that asks for nothing |

A field that isn't here is the client's own (clients send extras, vLLM ignores what it doesn't know) and passes. A test
compares this table with the installed vLLM and fails on a field of its that isn't classified.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct


class Rule(Enum):
    """What becomes of a field."""

    PASS = "pass"  # noqa: S105
    SET = "set"
    STRIP = "strip"
    REFUSE = "refuse"


class Field(Struct, frozen=True):
    """One field of a request."""

    rule: Rule
    decoder: msgspec.json.Decoder[Any] | None = None
    """Checks the type; `None`: the engine does."""
    harmless: tuple[bytes, ...] = (b"null",)
    """Of a refused field: values that ask for nothing."""
    why: str = ""
    """Of a refused field: completes "`field` …"."""
    most_bytes: int | None = None
    """The longest JSON text that is taken."""


class StreamOptions(Struct):
    """`stream_options`, as far as we care."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _pass(kind: Any = None, *, most_bytes: int | None = None) -> Field:
    return Field(Rule.PASS, None if kind is None else msgspec.json.Decoder(kind), most_bytes=most_bytes)


def _set(kind: Any = None) -> Field:
    return Field(Rule.SET, None if kind is None else msgspec.json.Decoder(kind))


def _refuse(why: str, *harmless: bytes) -> Field:
    return Field(Rule.REFUSE, harmless=(b"null", *harmless), why=why)


_STRIP: Final = Field(Rule.STRIP)
_NUMBER: Final = float | None
_WHOLE: Final = int | None
_FLAG: Final = bool | None
_WHOLES: Final = list[int] | None
_COUNT: Final = Annotated[int, Meta(ge=1)] | None
_OBJECT: Final = dict[str, Raw] | None
_GRAMMAR_BYTES: Final = 65_536
"""An engine compiles grammars one after the other, abandoned ones too, and all its callers wait: on two cores a schema
of 250 KB took 6 s, one of 500 KB 45 s."""

COMMON: Final[Mapping[str, Field]] = {
    # Ours.
    "model": _set(str),
    "stream_options": _set(StreamOptions | None),
    "cache_salt": _set(),
    "request_id": _set(),
    # What a request is made of.
    "stream": _pass(_FLAG),
    "n": _pass(_COUNT),
    "max_tokens": _pass(_WHOLE),
    "temperature": _pass(_NUMBER),
    "top_p": _pass(_NUMBER),
    "top_k": _pass(_WHOLE),
    "min_p": _pass(_NUMBER),
    "seed": _pass(_WHOLE),
    "stop": _pass(str | list[str] | None),
    "stop_token_ids": _pass(_WHOLES),
    "min_tokens": _pass(_WHOLE),
    "ignore_eos": _pass(_FLAG),
    "include_stop_str_in_output": _pass(_FLAG),
    "frequency_penalty": _pass(_NUMBER),
    "presence_penalty": _pass(_NUMBER),
    "repetition_penalty": _pass(_NUMBER),
    "repetition_detection": _pass(_OBJECT),
    "length_penalty": _pass(_NUMBER),
    "logit_bias": _pass(dict[str, float] | None),
    "allowed_token_ids": _pass(_WHOLES),
    "bad_words": _pass(list[str] | None),
    "prompt_logprobs": _pass(_WHOLE),
    "logprob_token_ids": _pass(_WHOLES),
    "thinking_token_budget": _pass(),
    "truncate_prompt_tokens": _pass(_WHOLE),
    "truncation_side": _pass(),
    "echo": _pass(_FLAG),
    "add_special_tokens": _pass(_FLAG),
    "skip_special_tokens": _pass(_FLAG),
    "spaces_between_special_tokens": _pass(_FLAG),
    "response_format": _pass(_OBJECT, most_bytes=_GRAMMAR_BYTES),
    "structured_outputs": _pass(_OBJECT, most_bytes=_GRAMMAR_BYTES),
    "return_tokens_as_token_ids": _pass(_FLAG),
    "return_token_ids": _pass(_FLAG),
    "stream_interval": _pass(_COUNT),
    "watermarking": _pass(_FLAG),
    "user": _pass(),
    # Of no effect here, or not a tenant's to decide.
    "priority": _STRIP,
    "session_id": _STRIP,
    "routed_experts_prompt_start": _STRIP,
    "return_token_offsets": _STRIP,
    "mm_payload": _STRIP,
    "return_mm_kwargs": _STRIP,
    "service_tier": _STRIP,
    "metadata": _STRIP,
    # What this server does not do for tenants.
    "store": _refuse("can't be set: no response is stored here", b"false"),
    "use_beam_search": _refuse("is not offered", b"false"),
    "kv_transfer_params": _refuse("is not for callers"),
    "ec_transfer_params": _refuse("is not for callers"),
    "vllm_xargs": _refuse("is not for callers", b"{}"),
}

CHAT: Final[Mapping[str, Field]] = {
    **COMMON,
    "messages": _pass(),  # looked into by `chat`
    "logprobs": _pass(_FLAG),
    "top_logprobs": _pass(_WHOLE),
    "max_completion_tokens": _pass(_WHOLE),
    "tools": _pass(list[dict[str, Raw]] | None),
    "tool_choice": _pass(str | dict[str, Raw] | None),
    "parallel_tool_calls": _pass(_FLAG),
    "reasoning_effort": _pass(str | None),
    "include_reasoning": _pass(_FLAG),
    "add_generation_prompt": _pass(_FLAG),
    "continue_final_message": _pass(_FLAG),
    "documents": _pass(list[dict[str, str]] | None),
    "chat_template_kwargs": _pass(_OBJECT),  # looked into by `chat`
    "return_prompt_text": _pass(_FLAG),
    "chat_template": _refuse("can't be set: templates run in engines that others use"),
    "media_io_kwargs": _refuse("is not for callers", b"{}"),
    "mm_processor_kwargs": _refuse("is not for callers", b"{}"),
}

COMPLETIONS: Final[Mapping[str, Field]] = {
    **COMMON,
    "prompt": _pass(),  # counted and checked by `completions`
    "logprobs": _pass(_WHOLE),
    "suffix": _pass(str | None),
    "prompt_embeds": _refuse("can't be set: tensors are not taken from callers"),
}
