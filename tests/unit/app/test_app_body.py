"""Bodies: what passes does so byte for byte, what is ours is set, and what can't be is named."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec import Raw

from app.errors import BodyTooLarge, BodyTooSlow, MediaTypeUnsupported, RequestInvalid
from app.openai import body
from app.openai.body import ClientGone, Endpoint, cache_salt, compose, parse
from app.openai.chat import CHAT
from app.openai.completions import COMPLETIONS
from engines.model import Model, ModelDigest, RequestDefaults, RuntimeArguments, Variant
from engines.sse import UsageWanted

MODEL = Model(
    name="tiny",
    digest=ModelDigest("0123456789abcdef" * 4),
    architecture="X",
    weights_bytes=1,
    parameters=1,
    max_model_len=64,
    kv_bytes_per_token=1,
    dtype="bfloat16",
    source="test",
)
HELLO = b'"messages":[{"role":"user","content":"hello"}]'


def variant(workspace: str = "acme", **defaults: Any) -> Variant:
    return Variant(
        workspace=workspace,
        name="bot",
        model=MODEL,
        arguments=RuntimeArguments(max_num_seqs=4),
        defaults=RequestDefaults(**defaults),
    )


def composed(raw: bytes, endpoint: Endpoint = CHAT, of: Variant | None = None) -> bytes:
    return compose(parse(endpoint, raw), of or variant())


def chat(fields: bytes) -> bytes:
    return b'{"model":"bot",' + HELLO + (b"," + fields if fields else b"") + b"}"


def refused(raw: bytes, endpoint: Endpoint = CHAT) -> tuple[str | None, str]:
    with pytest.raises(RequestInvalid) as error:
        composed(raw, endpoint)
    return error.value.param, str(error.value)


def test_what_passes_goes_through_byte_for_byte() -> None:
    fields = (
        '"temperature" : 0.70, "seed":1e3,"x":{"b" :1 ,"a":[1.50,"\\u00e9é\\ud83d\\ude00"]},"stop":null, "é\\n":true'
    ).encode()
    sent = composed(chat(fields.replace(b'"seed":1e3,', b"")))
    for piece in (b'"temperature":0.70', b'"x":{"b" :1 ,"a":[1.50,"\\u00e9\xc3\xa9\\ud83d\\ude00"]}', b'"stop":null'):
        assert piece in sent
    assert json.loads(sent)["é\n"] is True


def test_ours_are_set_whatever_the_client_says() -> None:
    said = b'"stream":true,"stream_options":{"include_usage":true},"cache_salt":"mine","request_id":"mine"'
    sent = json.loads(composed(chat(said)))
    assert sent == {
        "model": "m-0123456789abcdef",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "cache_salt": json.loads(bytes(cache_salt("acme"))),
    }


def test_i7_workspaces_never_share_a_cache_salt() -> None:
    salts = {json.loads(composed(chat(b""), of=variant(workspace)))["cache_salt"] for workspace in ("acme", "other")}
    assert len(salts) == 2


def test_a_request_that_is_not_streamed_gets_no_stream_options() -> None:
    assert "stream_options" not in json.loads(composed(chat(b"")))


def test_stripped_fields_are_gone_and_refused_ones_may_ask_for_nothing() -> None:
    sent = json.loads(composed(chat(b'"priority":-5,"metadata":{},"store":false,"kv_transfer_params":null')))
    assert sent.keys() == {"model", "messages", "cache_salt"}


def test_a_body_of_very_many_fields_is_refused() -> None:
    few = ",".join(f'"x{number}":1' for number in range(body.MOST_FIELDS - 2)).encode()
    assert json.loads(composed(chat(few)))["x0"] == 1
    assert refused(chat(few + b',"one_more":1')) == (None, "the body has more than 256 fields")


@pytest.mark.parametrize("name", ["response_format", "structured_outputs"])
def test_a_grammar_that_would_take_an_engine_long_to_compile_is_refused(name: str) -> None:
    words = json.dumps({"enum": [f"w{number}" for number in range(10_000)]}).encode()
    assert refused(chat(b'"%b":%b' % (name.encode(), words))) == (name, f"`{name}` has more than 65536 bytes")


def test_very_many_content_parts_are_refused_over_all_messages() -> None:
    def message(parts: int) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "text", "text": "x"}] * parts}

    def chat_of(*parts: int) -> bytes:
        return json.dumps({"model": "bot", "messages": [message(count) for count in parts]}).encode()

    assert len(json.loads(composed(chat_of(4000, 96)))["messages"]) == 2
    assert refused(chat_of(4000, 97))[0] == "messages[1].content"


@pytest.mark.parametrize(
    "field",
    [
        b'"store":true',
        b'"kv_transfer_params":{}',
        b'"ec_transfer_params":{}',
        b'"chat_template":"{{ x }}"',
        b'"use_beam_search":true',
        b'"vllm_xargs":{"a":1}',
    ],
)
def test_a_refused_field_is_named(field: bytes) -> None:
    name = json.loads(b"{" + field + b"}").popitem()[0]
    param, message = refused(chat(field))
    assert param == name
    assert f"`{name}`" in message


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (b'"temperature":"hot"', "temperature"),
        (b'"n":0', "n"),
        (b'"n":true', "n"),
        (b'"max_tokens":1.5', "max_tokens"),
        (b'"stop":[1]', "stop[0]"),
        (b'"stream":"yes"', "stream"),
        (b'"stream_options":{"include_usage":3}', "stream_options.include_usage"),
        (b'"tools":{}', "tools"),
        (b'"logit_bias":{"5":"x"}', "logit_bias[...]"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(field: bytes, param: str) -> None:
    assert refused(chat(field))[0] == param


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":1}x', "not JSON"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b'{"\xff":1}', "UTF-8"),
        (b'{"a":"\\ud800"}', "not JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    param, message = refused(raw)
    assert param is None
    assert words in message


def test_a_field_that_comes_twice_is_refused_however_it_is_spelt() -> None:
    assert refused(b'{"model":"bot",' + HELLO + b',"n":1, "n" :1}') == ("n", "`n` comes twice")
    assert refused(b'{"model":"bot",' + HELLO + b',"n":1,"\\u006e":1}')[0] == "n"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"messages":[]}', "model"),
        (b'{"model":"bot"}', "messages"),
        (b'{"model":null,' + HELLO + b"}", "model"),
        (b'{"model":"bot","messages":[]}', "messages"),
        (b'{"model":"bot","messages":"hi"}', "messages"),
        (b'{"model":"bot","messages":[{"content":"hi"}]}', "messages[0]"),
        (b'{"model":"bot","messages":[{"role":1}]}', "messages[0].role"),
    ],
)
def test_what_a_chat_needs_is_named_when_it_is_missing(raw: bytes, param: str) -> None:
    assert refused(raw)[0] == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"image_url": "https://example.com/x.png"},
        {"type": "text", "text": "x", "image_url": {"url": "https://example.com/x.png"}, "uuid": "1"},
        {"type": "audio_url", "audio_url": {"url": "ftp://x"}},
        {"type": "video_url", "video_url": {}},
        {"type": "input_image", "image_url": "https://example.com"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": ["image_url"], "image_url": "https://example.com/x.png"},
    ],
)
def test_remote_media_and_tensors_are_refused_wherever_they_stand(part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    raw = json.dumps({"model": "bot", "messages": messages}).replace("image", "im\\u0061ge").encode()
    assert refused(raw)[0] == "messages[1].content[1]"


def test_media_in_the_request_itself_pass() -> None:
    url = {"url": "data:image/png;base64,AAAA"}
    messages = [{"role": "user", "content": ["hi", {"type": "image_url", "image_url": url}]}]
    assert json.loads(composed(json.dumps({"model": "bot", "messages": messages}).encode()))["messages"] == messages


def test_a_variants_defaults_stand_in_only_where_the_client_says_nothing() -> None:
    of = variant(system_prompt='Be "kind".', temperature=0.5, top_p=0.25, max_tokens=7)
    sent = json.loads(composed(chat(b'"temperature":0,"top_p":null'), of=of))
    assert sent["messages"] == [
        {"role": "system", "content": 'Be "kind".'},
        {"role": "user", "content": "hello"},
    ]
    assert (sent["temperature"], sent["top_p"], sent["max_completion_tokens"]) == (0, 0.25, 7)
    own = b'{"model":"bot","messages":[{"role":"developer","content":"x"}],"max_tokens":3}'
    sent = json.loads(composed(own, of=of))
    assert [message["role"] for message in sent["messages"]] == ["developer"]
    assert "max_completion_tokens" not in sent


@pytest.mark.parametrize(
    ("prompt", "n", "sequences"),
    [("hi", 1, 1), (["a", "b"], 1, 2), ([1, 2, 3], 2, 2), ([[1], [2, 3]], 2, 4)],
)
def test_sequences_are_n_times_the_prompts(prompt: Any, n: int, sequences: int) -> None:
    raw = json.dumps({"model": "bot", "prompt": prompt, "n": n}).encode()
    assert parse(COMPLETIONS, raw).sequences == sequences


def test_more_sequences_than_an_engine_has_slots_are_refused_at_once() -> None:
    assert refused(chat(b'"n":5'))[0] == "n"
    assert composed(chat(b'"n":4'))


@pytest.mark.parametrize("prompt", ["[]", '["a",1]', "[[1],2]", "null", "{}", "true"])
def test_a_prompt_of_no_known_kind_is_refused(prompt: str) -> None:
    assert (refused(b'{"model":"bot","prompt":' + prompt.encode() + b"}", COMPLETIONS)[0] or "").startswith("prompt")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (b"null", UsageWanted.NONE),
        (b'{"include_usage":false,"continuous_usage_stats":true}', UsageWanted.NONE),
        (b'{"include_usage":true}', UsageWanted.LAST),
        (b'{"include_usage":true,"continuous_usage_stats":true,"x":1}', UsageWanted.EVERY),
    ],
)
def test_what_usage_is_wanted_is_read_from_the_stream_options(options: bytes, wanted: UsageWanted) -> None:
    assert parse(CHAT, chat(b'"stream":true,"stream_options":' + options)).wanted is wanted


# ---------------------------------------------------------------------- reading


class Sender:
    """A client's body in parts; after those it is silent."""

    def __init__(self, *parts: bytes, end: bool = True) -> None:
        self.parts = list(parts)
        self.end = end

    async def __call__(self) -> Any:
        if not self.parts:
            if self.end:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts) or not self.end}


async def test_a_body_is_read_in_parts() -> None:
    assert await body.read(Sender(b"ab", b"c"), {}, most=3, timeout_s=1) == b"abc"


async def test_a_body_over_the_limit_is_refused_by_its_length_or_its_size() -> None:
    with pytest.raises(BodyTooLarge):
        await body.read(Sender(), {b"content-length": b"4"}, most=3, timeout_s=1)
    with pytest.raises(BodyTooLarge):
        await body.read(Sender(b"ab", b"cd"), {}, most=3, timeout_s=1)


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with pytest.raises(BodyTooSlow):
        await body.read(Sender(b"ab", end=False), {}, most=3, timeout_s=0.01)


async def test_a_client_that_leaves_while_it_sends_is_noticed() -> None:
    sender = Sender(b"ab", b"")
    sender.parts = [b"ab"]
    sender.end = False
    task = asyncio.create_task(body.read(sender, {}, most=3, timeout_s=60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ClientGone):
        await body.read(Sender(), {}, most=3, timeout_s=1)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"content-type": b"text/plain"},
        {b"content-type": b"application/json", b"content-encoding": b"gzip"},
    ],
)
def test_only_plain_json_is_taken(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(MediaTypeUnsupported):
        body.check_media_type(headers)
    body.check_media_type({b"content-type": b"Application/JSON; charset=utf-8"})


def test_a_salt_tells_nothing_of_the_workspace() -> None:
    assert isinstance(cache_salt("acme"), Raw)
    assert b"acme" not in bytes(cache_salt("acme"))
