from __future__ import annotations

import pytest

from app.cli.chat import Reading, Turn
from app.refusal import Refused


def delta(content: str) -> bytes:
    return f'data: {{"choices":[{{"index":0,"delta":{{"content":"{content}"}}}}]}}\n'.encode()


def test_an_answer_that_waited_for_an_engine() -> None:
    reading = Reading(10.0)
    lines = [
        (b": loading smollm2\n", 10.1, ""),
        (b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n', 12.0, ""),
        (delta("Pa"), 12.5, "Pa"),
        (b"\n", 12.5, ""),
        (delta("ris"), 12.6, "ris"),
        (b'data: {"choices":[],"usage":{"prompt_tokens":37,"completion_tokens":8,"total_tokens":45}}\n', 13.2, ""),
        (b"data: [DONE]\n", 13.2, ""),
    ]
    assert [reading.line(line, now) for line, now, _ in lines] == [text for _, _, text in lines]
    turn = reading.turn(13.5)
    assert turn == Turn(
        answer="Paris", cold=True, first_token_s=2.5, total_s=3.5, prompt_tokens=37, completion_tokens=8
    )
    assert turn.summary == (
        "an engine started for it, first token after 2.50 s; 37 tokens in, 8 out, 7 a second; 3.50 s in all"
    )


def test_an_answer_without_tokens() -> None:
    turn = Reading(0.0).turn(1.0)
    assert turn.summary == "no token; 0 tokens in, 0 out; 1.00 s in all"


def test_an_error_in_the_stream_is_refused_in_its_own_words() -> None:
    with pytest.raises(Refused, match="the engine stopped"):
        Reading(0.0).line(b'data: {"error":{"message":"the engine stopped","type":"server_error"}}\n', 1.0)
