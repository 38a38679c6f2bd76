"""The header of a safetensors file, read and checked against the file's size. Pure: it is given bytes, never a file.

    8 bytes   N, unsigned, little-endian
    N bytes   JSON: {"tensor": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    the rest  the tensors' bytes; offsets count from here, and the tensors cover it without gap or overlap

What is wrong is a `ModelInvalid` that names the file; nothing else is ever raised. vLLM would find the same faults,
but only when an engine starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from engines.errors import ModelInvalid

PREFIX_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""

BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, by the format's name of the dtype."""

_MAX_DIMENSIONS = 64
_Offset = Annotated[int, Meta(ge=0, le=2**62)]


class _Entry(Struct, frozen=True):
    dtype: str
    shape: Annotated[tuple[_Offset, ...], Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Offset, _Offset]


class Tensor(Struct, frozen=True):
    """One tensor as the header describes it; its bytes are `begin` to `end` after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return _product(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


class Header(Struct, frozen=True):
    """A checked header: the tensors in the order of their bytes."""

    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


def header_bytes(prefix: bytes, file_size: int, file: str) -> int:
    """How many bytes of header follow the first eight; `ModelInvalid` where the file can't hold so many."""
    if len(prefix) < PREFIX_BYTES or file_size < PREFIX_BYTES:
        raise ModelInvalid(f"{file}: {file_size} bytes are too few for a safetensors file", field=file)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise ModelInvalid(f"{file}: corrupt header, or no safetensors file (it claims {length:,} bytes)", field=file)
    if PREFIX_BYTES + length > file_size:
        reason = f"its header claims {length:,} bytes and the file has {file_size:,}"
        raise ModelInvalid(f"{file}: corrupt or cut short: {reason}", field=file)
    return length


def read_header(header: bytes, file_size: int, file: str) -> Header:
    """Read the JSON between prefix and tensors and hold it against the file's size; raises `ModelInvalid`."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = [_tensor(name, raw, file) for name, raw in entries.items()]
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ModelInvalid(f"{file}: corrupt header: not the JSON of a safetensors file", field=file) from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _cover(tensors, file_size - PREFIX_BYTES - len(header), file)
    return Header(tuple(tensors))


def _tensor(name: str, raw: msgspec.Raw, file: str) -> Tensor:
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except (msgspec.DecodeError, ValueError, RecursionError):
        reason = f"tensor {name[:100]!r} has no proper dtype, shape and data_offsets"
        raise ModelInvalid(f"{file}: corrupt header: {reason}", field=file) from None
    begin, end = entry.data_offsets
    bits = BITS.get(entry.dtype)
    if bits is None:
        reason = f"tensor {name[:100]!r} has the unknown dtype {entry.dtype[:20]!r}"
        raise ModelInvalid(f"{file}: {reason}", field=file)
    if (end - begin) * 8 != _product(entry.shape) * bits:
        reason = f"tensor {name[:100]!r} of {end - begin} bytes can't be {entry.dtype} of shape {list(entry.shape)}"
        raise ModelInvalid(f"{file}: corrupt header: {reason}", field=file)
    return Tensor(name, entry.dtype, entry.shape, begin, end)


def _cover(tensors: Iterable[Tensor], data_bytes: int, file: str) -> None:
    """Refuse tensors (sorted by their offsets) that leave gaps, overlap, or don't end where the file does."""
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            reason = f"tensor {tensor.name[:100]!r} begins at {tensor.begin:,}, not where the one before it ends"
            raise ModelInvalid(f"{file}: corrupt header: {reason} ({position:,})", field=file)
        position = tensor.end
    if position != data_bytes:
        reason = f"its header describes {position:,} bytes of tensors and the file has {data_bytes:,}"
        raise ModelInvalid(f"{file}: corrupt or cut short: {reason}", field=file)


def _product(shape: Iterable[int]) -> int:
    elements = 1
    for dimension in shape:
        elements *= dimension
    return elements
