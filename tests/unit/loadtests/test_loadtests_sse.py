"""The stream reader against bytes on a clock that advances one second a line."""

from collections.abc import Callable
from itertools import count

import pytest

from loadtests.sse import Stream, read

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}}'
DONE = b"data: [DONE]"


def text(content: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}' % content.encode()


def wire(*events: bytes, newline: bytes = b"\n") -> Callable[[], bytes]:
    lines = iter([line for event in events for line in (event + newline, newline)])
    return lambda: next(lines, b"")


def seconds() -> Callable[[], float]:
    ticks = count(1)
    return lambda: float(next(ticks))


def test_a_stream_is_timed_by_the_chunks_that_carry_tokens() -> None:
    stream = read(wire(ROLE, text("Par"), text("is"), text("."), STOP, USAGE, DONE), seconds())
    assert stream == Stream(arrivals=[2.0, 3.0, 4.0], finished=5.0, ended=7.0, tokens=4, text="Paris.")
    assert stream.first_token_s(0.5) == 1.5
    assert stream.inter_token_s() == 1.0  # four tokens from 2 to 5: the end of text has no chunk of its own
    assert stream.gaps_s() == [1.0, 1.0]


def test_without_usage_every_chunk_is_a_token() -> None:
    stream = read(wire(text("a"), text("b"), STOP, DONE), seconds())
    assert stream.completion_tokens == 2
    assert stream.inter_token_s() == 2.0


def test_one_token_has_no_inter_token_time() -> None:
    stream = read(wire(text("a"), STOP, DONE), seconds())
    assert stream.failure is None
    assert stream.inter_token_s() is None


def test_comments_with_one_newline_are_no_events_and_no_tokens() -> None:
    lines = iter(
        [b": loading eta=2\n", b": loading eta=1\n", text("a") + b"\n", b"\n", STOP + b"\n", b"\n", DONE + b"\n", b"\n"]
    )
    stream = read(lambda: next(lines, b""), seconds())
    assert (stream.comments, stream.arrivals, stream.failure) == (2, [1.0], None)


def test_carriage_returns_and_a_missing_space_are_fine() -> None:
    events = [event.replace(b"data: ", b"data:") for event in (text("a"), STOP, DONE)]
    assert read(wire(*events, newline=b"\r\n"), seconds()).failure is None


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"choices":[{"text":"a"}]}',
        b'data: {"choices":[{"delta":{"reasoning_content":"a"}}]}',
        b'data: {"choices":[{"delta":{"reasoning":"a"}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}',
        b'data: {"choices":[{"delta":{"content":"a"},"logprobs":null}],"usage":null,"id":"x"}',
    ],
)
def test_tokens_are_seen_in_every_kind_of_chunk(chunk: bytes) -> None:
    assert read(wire(chunk, STOP, DONE), seconds()).arrivals == [1.0]


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ((text("a"), STOP), "no [DONE]"),
        ((text("a"), DONE), "no finish reason"),
        ((text("a"), b'data: {"error":{"message":"m","type":"server_error","code":"x"}}', DONE), "error frame: x"),
        (
            (text("a"), b'data: {"error":{"message":"m","type":"server_error","code":null}}', DONE),
            "error frame: server_error",
        ),
        ((text("a"), b'data: {"error":"m"}', DONE), "error frame: unnamed"),
        ((text("a"), b"data: {", STOP, DONE), "an event that is no completion chunk"),
        ((text("a"), STOP, DONE, text("b")), "events after [DONE]"),
        ((), "no [DONE]"),
    ],
)
def test_a_stream_that_does_not_end_well_fails(events: tuple[bytes, ...], failure: str) -> None:
    assert read(wire(*events), seconds()).failure == failure


def test_a_body_that_ends_inside_an_event_fails() -> None:
    lines = iter([text("a") + b"\n"])
    stream = read(lambda: next(lines, b""), seconds())
    assert (stream.failure, stream.arrivals) == ("cut inside an event", [])


def test_no_content_is_in_a_failure() -> None:
    stream = read(wire(b"data: secret words", DONE), seconds())
    assert "secret" not in (stream.failure or "")
