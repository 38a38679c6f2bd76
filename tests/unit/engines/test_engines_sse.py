"""The relay takes bytes cut anywhere and gives the client whole events, byte for byte but for model and usage."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import EngineLost
from engines.sse import EngineError, EngineUsage, Relay, UsageWanted, answer, error_of

SERVED, SHOWN = "m-0123456789abcdef", "support-bot"
ROLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1790000000,"model":"m-0123456789abcdef",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
    b'"usage":{"prompt_tokens":37,"total_tokens":37,"completion_tokens":0,"completion_tokens_details":null}}'
)
TOKEN = (
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1790000000,"model":"m-0123456789abcdef",'
    b'"choices":[{"index":0,"delta":{"content":" \\"usage\\":{}, \\"model\\" {\xc3\xa9} \\ud83d\\ude00"},'
    b'"logprobs":null,"finish_reason":null,"token_ids":null}],'
    b'"usage":{"prompt_tokens":37,"total_tokens":38,"completion_tokens":1,"completion_tokens_details":null}}'
)
LAST = (
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1790000000,"model":"m-0123456789abcdef",'
    b'"choices":[],"usage":{"prompt_tokens":37,"total_tokens":38,"completion_tokens":1,'
    b'"prompt_tokens_details":{"cached_tokens":16}}}'
)


def stream(*payloads: bytes, done: bool = True) -> bytes:
    events = [b"data: " + payload + b"\n\n" for payload in payloads]
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def relay(wanted: UsageWanted = UsageWanted.NONE) -> Relay:
    return Relay(served=SERVED, shown=SHOWN, wanted=wanted)


def payloads(data: bytes) -> list[bytes]:
    assert data == b"" or data.endswith(b"\n\n")
    return [event.removeprefix(b"data: ") for event in data.split(b"\n\n")[:-1]]


def test_usage_is_cut_out_when_nobody_asked_for_it_and_all_else_stays_byte_for_byte() -> None:
    portion = relay().feed(stream(ROLE, TOKEN, LAST))
    expected = [
        payload.replace(SERVED.encode(), SHOWN.encode()).rpartition(b',"usage":')[0] + b"}" for payload in (ROLE, TOKEN)
    ]
    assert payloads(portion.data) == expected
    assert portion.done


def test_only_the_last_usage_is_kept_for_include_usage() -> None:
    seen = payloads(relay(UsageWanted.LAST).feed(stream(ROLE, TOKEN, LAST)).data)
    assert [b'"usage":{' in payload for payload in seen] == [False, False, True]
    assert seen[2] == LAST.replace(SERVED.encode(), SHOWN.encode())


def test_every_usage_is_kept_for_continuous_usage_stats() -> None:
    seen = payloads(relay(UsageWanted.EVERY).feed(stream(ROLE, TOKEN, LAST)).data)
    assert seen == [payload.replace(SERVED.encode(), SHOWN.encode()) for payload in (ROLE, TOKEN, LAST)]


def test_the_last_usage_seen_is_remembered_and_known_to_be_final_or_not() -> None:
    one = relay()
    one.feed(stream(ROLE, TOKEN, done=False))
    assert (one.usage, one.complete) == (EngineUsage(37, 0, 1), False)
    one.feed(stream(LAST))
    assert (one.usage, one.complete) == (EngineUsage(37, 16, 1), True)


def test_what_came_together_goes_together_and_done_is_kept_back() -> None:
    one = relay()
    assert one.feed(b"data: " + ROLE).data == b""
    portion = one.feed(b"\n\ndata: " + TOKEN + b"\n\ndata: [DO")
    assert len(payloads(portion.data)) == 2
    assert not portion.done
    last = one.feed(b"NE]\n\n")
    assert (last.data, last.done) == (b"", True)
    assert one.feed(stream(TOKEN)).data == b""


def test_an_error_frame_is_no_success_though_done_follows() -> None:
    frame = b'{"error": {"message": "EngineCore died", "type": "InternalServerError", "param": null, "code": 500}}'
    portion = relay().feed(stream(ROLE, frame))
    assert len(payloads(portion.data)) == 1
    assert not portion.done
    assert portion.error == EngineError("EngineCore died", 500)


def test_comments_of_the_engine_are_left_out() -> None:
    portion = relay().feed(b": keep-alive\n\n" + stream(TOKEN, done=False))
    assert len(payloads(portion.data)) == 1


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: [1]\n\n", b"data: " + b"[" * 100_000 + b"\n\n"])
def test_an_event_that_is_no_json_object_is_a_lost_engine(event: bytes) -> None:
    with pytest.raises(EngineLost):
        relay().feed(event)


def test_a_name_that_could_stand_elsewhere_is_replaced_at_the_first_level_only() -> None:
    payload = b'{"choices":[{"x":{"model":"m-0123456789abcdef"}}],"model":"m-0123456789abcdef","later":1}'
    (seen,) = payloads(relay().feed(stream(payload, done=False)).data)
    assert seen == b'{"choices":[{"x":{"model":"m-0123456789abcdef"}}],"model":"support-bot","later":1}'


def test_our_name_never_leaks_however_the_engine_spaces_its_json() -> None:
    payload = json.dumps({"model": SERVED, "choices": [{"delta": {"content": "usage"}}], "usage": {"prompt_tokens": 1}})
    (seen,) = payloads(relay().feed(stream(payload.encode(), done=False)).data)
    assert json.loads(seen) == {"model": SHOWN, "choices": [{"delta": {"content": "usage"}}]}


def test_a_whole_answer_keeps_its_usage_and_gets_the_variants_name() -> None:
    body = (
        b'{"id":"chatcmpl-1","model":"m-0123456789abcdef","choices":[{"x":1.50}],'
        b'"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    )
    assert answer(body, served=SERVED, shown=SHOWN) == (
        body.replace(SERVED.encode(), SHOWN.encode()),
        EngineUsage(3, 0, 2),
    )
    with pytest.raises(EngineLost):
        answer(b"oops", served=SERVED, shown=SHOWN)


def test_any_body_of_an_error_response_is_read() -> None:
    assert error_of(b'{"error":{"message":"too long","param":"messages","code":400}}', 400) == EngineError(
        "too long", 400, "messages"
    )
    assert error_of(b"<html>", 502) == EngineError("the engine answered 502", 502)


_text = st.text(alphabet=st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [',"usage":{', '"model":"m-0123456789abcdef"', "\n\ndata: [DONE]\n\n", "}}", "\\"]
)
_usage = st.builds(
    lambda p, c, k: {"prompt_tokens": p, "total_tokens": p + c, "completion_tokens": c, "prompt_tokens_details": k},
    st.integers(0, 999),
    st.integers(0, 999),
    st.none() | st.builds(lambda n: {"cached_tokens": n}, st.integers(0, 5)),
)
_chunk = st.fixed_dictionaries(
    {
        "id": _text,
        "model": st.just(SERVED),
        "choices": st.lists(
            st.fixed_dictionaries({"index": st.integers(0, 3), "delta": st.dictionaries(_text, _text)})
        ),
    },
    optional={"usage": _usage, "extra": _text},
)


@given(
    chunks=st.lists(_chunk, max_size=6),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    wanted=st.sampled_from(UsageWanted),
    spaced=st.booleans(),
)
def test_any_cutting_of_the_stream_gives_the_same_client_bytes(
    chunks: list[dict[str, object]], cuts: list[int], wanted: UsageWanted, spaced: bool
) -> None:
    encode = (lambda c: json.dumps(c).encode()) if spaced else msgspec.json.encode
    whole = stream(*(encode(chunk) for chunk in chunks))
    at_once = relay(wanted).feed(whole)
    piecemeal = relay(wanted)
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    portions = [piecemeal.feed(whole[start:end]) for start, end in itertools.pairwise(edges)]
    assert b"".join(portion.data for portion in portions) == at_once.data
    assert portions[-1].done
    expected = []
    for chunk in chunks:
        last = chunk["choices"] == [] and "usage" in chunk
        if last and wanted is UsageWanted.NONE:
            continue
        keeps = wanted is UsageWanted.EVERY or (wanted is UsageWanted.LAST and last)
        expected.append({**{k: v for k, v in chunk.items() if k != "usage" or keeps}, "model": SHOWN})
    assert [json.loads(payload) for payload in payloads(at_once.data)] == expected
