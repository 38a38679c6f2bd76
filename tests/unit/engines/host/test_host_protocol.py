"""The engine host's protocol."""

from __future__ import annotations

import pytest

from engines.host.protocol import StartOrder, decode, encode, parse_start, start_request

ORDER = StartOrder(
    engine="e1",
    epoch=3,
    model_path="/m",
    served_name="m",
    engine_dir="/e",
    run_dir="/r",
    argv=("--dtype", "auto"),
    env={"CUDA_VISIBLE_DEVICES": "0"},
    threads=2,
)


def test_an_order_arrives_as_it_was_sent() -> None:
    assert parse_start(decode(start_request(ORDER))) == ORDER
    assert start_request(ORDER).count(b"\n") == 1


@pytest.mark.parametrize("line", [b"[]", b"1", b"null"])
def test_a_message_is_an_object(line: bytes) -> None:
    with pytest.raises(ValueError, match="object"):
        decode(line)


@pytest.mark.parametrize("change", [{"colour": "green"}, {"argv": None}])
def test_an_order_with_a_field_too_many_or_too_few_is_refused(change: dict[str, object]) -> None:
    message = decode(start_request(ORDER)) | change
    message = {name: value for name, value in message.items() if value is not None}
    with pytest.raises(ValueError, match="argument"):
        parse_start(message)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engine": 7}, "engine is of the wrong type: int"),
        ({"epoch": "3"}, "epoch is of the wrong type: str"),
        ({"epoch": True}, "epoch is of the wrong type: bool"),
        ({"threads": 1.5}, "threads is of the wrong type: float"),
        ({"argv": "--dtype auto"}, "argv is of the wrong type: str"),
        ({"argv": ["--threads", 2]}, "argv and env hold strings"),
        ({"env": ["A=1"]}, "env is of the wrong type: list"),
        ({"env": {"A": 1}}, "argv and env hold strings"),
    ],
)
def test_an_order_with_a_value_of_the_wrong_type_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_start(decode(start_request(ORDER)) | change)


def test_messages_are_lines() -> None:
    assert encode({"ok": True, "text": "a\nb"}) == b'{"ok":true,"text":"a\\nb"}\n'
