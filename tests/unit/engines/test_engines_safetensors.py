from __future__ import annotations

import json
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import ModelInvalid
from engines.safetensors import BITS, Header, Tensor, header_bytes, read_header


def encode(tree: object) -> bytes:
    return json.dumps(tree).encode()


def entry(dtype: str = "BF16", shape: tuple[int, ...] = (2, 3), begin: int = 0, end: int = 12) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read(tree: object, data: int) -> Header:
    header = encode(tree)
    return read_header(header, 8 + len(header) + data, "m.safetensors")


def test_a_header_gives_its_tensors_in_the_order_of_their_bytes() -> None:
    header = read({"b": entry(begin=4, end=16), "__metadata__": {"format": "pt"}, "a": entry("F32", (), 0, 4)}, 16)
    assert header == Header((Tensor("a", "F32", (), 0, 4), Tensor("b", "BF16", (2, 3), 4, 16)))
    assert header.size == 16
    assert [tensor.elements for tensor in header.tensors] == [1, 6]


def test_an_empty_tensor_and_a_padded_header_are_fine() -> None:
    header = encode({"a": entry("F16", (0, 5), 0, 0), "b": entry("U8", (3,), 0, 3)}) + b"   "
    assert read_header(header, 8 + len(header) + 3, "m.safetensors").size == 3


def test_packed_dtypes_count_bits() -> None:
    assert read({"a": entry("F4", (4, 4), 0, 8)}, 8).size == 8


@pytest.mark.parametrize(
    ("tree", "data", "reason"),
    [
        ([], 0, "not the JSON of a safetensors file"),
        ({"a": 1}, 0, "tensor 'a' has no proper dtype, shape and data_offsets"),
        ({"a": {"dtype": "BF16", "shape": [1]}}, 2, "tensor 'a' has no proper dtype, shape and data_offsets"),
        ({"a": entry(shape=(-2, -3))}, 12, "tensor 'a' has no proper dtype, shape and data_offsets"),
        ({"a": entry("Q4_K")}, 12, "tensor 'a' has the unknown dtype 'Q4_K'"),
        ({"a": entry("F32")}, 12, "tensor 'a' of 12 bytes can't be F32 of shape [2, 3]"),
        ({"a": entry(begin=12, end=0)}, 12, "tensor 'a' of -12 bytes can't be BF16 of shape [2, 3]"),
        ({"a": entry(begin=1, end=13)}, 13, "tensor 'a' begins at 1, not where the one before it ends (0)"),
        (
            {"a": entry(), "b": entry(begin=6, end=18)},
            18,
            "tensor 'b' begins at 6, not where the one before it ends (12)",
        ),
        ({"a": entry()}, 11, "its header describes 12 bytes of tensors and the file has 11"),
        ({"a": entry()}, 13, "its header describes 12 bytes of tensors and the file has 13"),
    ],
)
def test_what_is_wrong_in_a_header_is_named_with_its_file(tree: object, data: int, reason: str) -> None:
    with pytest.raises(ModelInvalid) as caught:
        read(tree, data)
    assert str(caught.value).startswith("m.safetensors: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "size", "reason"),
    [
        (b"", 0, "0 bytes are too few"),
        (b"\x01\x00", 2, "2 bytes are too few"),
        (struct.pack("<Q", 100), 50, "corrupt or cut short: its header claims 100 bytes and the file has 50"),
        (b"PK\x03\x04ABCD", 10**9, "corrupt header, or no safetensors file"),
        (b"\xff" * 8, 10**9, "corrupt header, or no safetensors file"),
    ],
)
def test_a_prefix_that_the_file_cannot_hold_is_refused(prefix: bytes, size: int, reason: str) -> None:
    with pytest.raises(ModelInvalid, match=reason):
        header_bytes(prefix, size, "m.safetensors")


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_bytes_as_a_header_give_a_header_or_modelinvalid(header: bytes, data: int) -> None:
    try:
        assert read_header(header, 8 + len(header) + data, "m.safetensors").size == data
    except ModelInvalid as error:
        assert str(error).startswith("m.safetensors: ")


@given(st.binary(max_size=12), st.integers(0, 2**70))
def test_any_prefix_gives_a_length_within_the_file_or_modelinvalid(prefix: bytes, size: int) -> None:
    try:
        assert 8 + header_bytes(prefix, size, "m.safetensors") <= size
    except ModelInvalid as error:
        assert str(error).startswith("m.safetensors: ")


_numbers = st.integers(-(2**70), 2**70) | st.floats() | st.none() | st.text(max_size=3)
_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BITS, "bogus"]) | _numbers,
        "shape": st.lists(_numbers | st.integers(0, 4), max_size=80),
        "data_offsets": st.lists(_numbers | st.integers(0, 64), max_size=3),
    },
)


@given(st.dictionaries(st.text(max_size=8), _entries | _numbers, max_size=4), st.integers(0, 64))
def test_any_json_as_a_header_gives_a_header_or_modelinvalid(tree: dict[str, object], data: int) -> None:
    try:
        assert read(tree, data).size == data
    except ModelInvalid as error:
        assert str(error).startswith("m.safetensors: ")


_shapes = st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64"]), st.lists(st.integers(0, 5), max_size=3)))


@given(_shapes, st.data())
def test_a_true_header_is_read_and_one_flipped_byte_is_never_a_crash(
    shapes: list[tuple[str, list[int]]], data: st.DataObject
) -> None:
    tree, position = {}, 0
    for number, (dtype, shape) in enumerate(shapes):
        size = BITS[dtype] // 8
        for dimension in shape:
            size *= dimension
        tree[f"t{number}"] = entry(dtype, tuple(shape), position, position + size)
        position += size
    header = encode(tree)
    assert read_header(header, 8 + len(header) + position, "m.safetensors").size == position

    flipped = bytearray(header)
    flipped[data.draw(st.integers(0, len(header) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read_header(bytes(flipped), 8 + len(header) + position, "m.safetensors")
    except ModelInvalid as error:
        assert str(error).startswith("m.safetensors: ")


def test_absurd_nesting_and_numbers_are_modelinvalid() -> None:
    for header in (
        b'{"a":' + b"[" * 100_000,
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[' + b",".join([b"4611686018427387904"] * 65) + b'],"data_offsets":[0,1]}}',
        msgspec.json.encode({"\ud7ff" * 1000: 1}),
    ):
        with pytest.raises(ModelInvalid):
            read_header(header, 8 + len(header) + 1, "m.safetensors")
