"""A model without the numbers of its weights: what is left is small to parse, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

__all__ = ["read_outline"]

_MAX_BYTES = 2**24
_MAX_FIELDS = 2**20
"""A model of 512 blocks has half of either."""

_NUMBERS = (
    onnx.ModelProto.GRAPH_FIELD_NUMBER,
    onnx.GraphProto.INITIALIZER_FIELD_NUMBER,
    onnx.TensorProto.RAW_DATA_FIELD_NUMBER,
)
"""Where they are: a path of fields."""

_VARINT, _EIGHT, _SIZED, _FOUR = 0, 1, 2, 5
"""How protobuf writes a field: what follows its key."""


def read_outline(content: memoryview) -> onnx.ModelProto:
    """Parses a model but for its initializers' raw data: time and memory depend on its nodes alone.

    Raises:
        ValueError: it is no model, or one of absurdly many parts.
        google.protobuf.message.DecodeError: it is no model.
    """
    return onnx.ModelProto.FromString(_without(content, _NUMBERS, iter(range(_MAX_FIELDS))))


def _without(data: memoryview, path: tuple[int, ...], budget: Iterator[int]) -> bytes:
    """A message without a field that is found by a path through others."""
    pieces: list[bytes | memoryview] = []
    at = 0
    while at < len(data):
        if next(budget, None) is None:
            raise ValueError(f"has more than {_MAX_FIELDS} parts")
        start = at
        key, at = _read_varint(data, at)
        inside = at
        if key & 7 == _VARINT:
            _, at = _read_varint(data, at)
        elif key & 7 == _SIZED:
            size, inside = _read_varint(data, at)
            at = inside + size
        elif key & 7 in (_EIGHT, _FOUR):
            at += 8 if key & 7 == _EIGHT else 4
        else:
            raise ValueError("is no ONNX model")
        if at > len(data):
            raise ValueError("ends too early")
        if key != path[0] << 3 | _SIZED:
            pieces.append(data[start:at])
        elif len(path) > 1:
            inner = _without(data[inside:at], path[1:], budget)
            pieces += [_write_varint(key), _write_varint(len(inner)), inner]
    if sum(map(len, pieces)) > _MAX_BYTES:
        raise ValueError(f"takes more than {_MAX_BYTES} bytes beside its weights")
    return b"".join(pieces)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 64, 7), data[at : at + 10], strict=False):
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("ends too early")


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
