"""Erlang's external term format, as far as weights files need it: data, never code.

Atoms stay text, whatever module or function they name; funs, pids, references and ports are refused. Every length that
the bytes claim is checked against what is left of them before anything is allocated, and nesting, number of terms and
size are bounded: at worst a term takes 64 bytes of memory for one of its own (empty lists), and 64 MB in all.

Source: https://www.erlang.org/doc/apps/erts/erl_ext_dist.html
"""

from __future__ import annotations

import math
import struct
from typing import Any, NoReturn

from .error import FormatError

__all__ = ["MAX_ATOM_CHARACTERS", "MAX_BYTES", "Atom", "decode", "describe", "encode"]

MAX_BYTES = 16 * 2**20
"""The largest term that is read. A tensor's description takes about 100 bytes, so this is for 100000 tensors."""

MAX_ATOM_CHARACTERS = 255
"""Erlang's own limit."""

_MAX_TERMS = 1_000_000
_MAX_DEPTH = 64
_MAX_INTEGER_BYTES = 64

_VERSION = 131
_NIL = 106

_REFUSED = {
    77: "BIT_BINARY_EXT",
    80: "a compressed term",
    82: "ATOM_CACHE_REF",
    88: "NEW_PID_EXT",
    89: "NEW_PORT_EXT",
    90: "NEWER_REFERENCE_EXT",
    99: "FLOAT_EXT",
    101: "REFERENCE_EXT",
    102: "PORT_EXT",
    103: "PID_EXT",
    112: "NEW_FUN_EXT",
    113: "EXPORT_EXT",
    114: "NEW_REFERENCE_EXT",
    117: "FUN_EXT",
    120: "V4_PORT_EXT",
    121: "LOCAL_EXT",
}
"""Tags that are known and not read, for the message."""


class Atom(str):
    """An atom's name, such as `ok`, `nil` or `Elixir.Nx.Container.Map`: text and nothing else."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f":{self}"


def decode(data: bytes | memoryview, start: int = 0) -> Any:
    """The one term that `data` holds.

    Integers and floats become Python's, atoms `Atom`, binaries `bytes`, and tuples, lists and maps Python's. The keys
    of a map may be atoms, binaries and integers of 32 bits: others could be made to collide in a Python dictionary.

    Args:
        data: the term with its version byte, 131, and nothing behind it.
        start: the place of `data` in whatever it was taken from, for the messages.

    Raises:
        FormatError: this is not such a term, or one that is not read here.
    """
    decoder = _Decoder(memoryview(data), start)
    if len(data) > MAX_BYTES:
        decoder.fail(f"a term of {len(data)} bytes; at most {MAX_BYTES} are read; give a weights file", 0)
    if decoder.unsigned(1) != _VERSION:
        decoder.fail(f"{data[0]} in place of {_VERSION}, with which an Erlang term begins; copy the file again", 0)
    term = decoder.term(1)
    if decoder.left:
        decoder.fail(f"{decoder.left} bytes behind the end of the term; copy the file again")
    return term


def encode(value: Any) -> bytes:
    """A term as bytes that OTP 20 and later read: what OTP 25 writes for it.

    Takes what `decode` returns, and writes maps in their own order.

    Raises:
        TypeError: a value that is no term: None and booleans are atoms in Erlang, text is bytes or an atom.
        ValueError: a float that is not finite, or an integer or an atom that is too long.
    """
    parts = [bytes([_VERSION])]
    _encode(value, parts)
    return b"".join(parts)


def describe(value: Any) -> str:
    """A term in a few printable words, however large it is."""
    match value:
        case Atom():
            return f":{value[:60]}" if value.isprintable() else f":{value[:60]!r}"
        case bytes() | str():
            return repr(value[:60])
        case (Atom() as first, *others) if isinstance(value, tuple):
            return f"{{{describe(first)}, ...}} of {1 + len(others)}"
        case tuple() | list() | dict():
            return f"a {'map' if isinstance(value, dict) else type(value).__name__} of {len(value)}"
        case _:
            return repr(value)


class _Decoder:
    def __init__(self, data: memoryview, start: int) -> None:
        self._data = data
        self._start = start
        self._place = 0
        self._terms = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def fail(self, what: str, place: int | None = None) -> NoReturn:
        raise FormatError(f"byte {self._start + (self._place if place is None else place)}: {what}")

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def term(self, depth: int) -> Any:
        place = self._place
        if depth > _MAX_DEPTH:
            self.fail(f"terms nested deeper than {_MAX_DEPTH}; give a weights file")
        self._count(1)
        match self.unsigned(1):
            case 97:  # SMALL_INTEGER_EXT
                return self.unsigned(1)
            case 98:  # INTEGER_EXT
                return int.from_bytes(self._take(4), "big", signed=True)
            case 110 | 111 as tag:  # SMALL_BIG_EXT, LARGE_BIG_EXT
                return self._big(1 if tag == 110 else 4)
            case 70:  # NEW_FLOAT_EXT
                return self._float()
            case 100 | 115 as tag:  # ATOM_EXT, SMALL_ATOM_EXT
                return self._atom(2 if tag == 100 else 1, "latin-1")
            case 118 | 119 as tag:  # ATOM_UTF8_EXT, SMALL_ATOM_UTF8_EXT
                return self._atom(2 if tag == 118 else 1, "utf-8")
            case 104 | 105 as tag:  # SMALL_TUPLE_EXT, LARGE_TUPLE_EXT
                return tuple(self._items(1 if tag == 104 else 4, depth))
            case 106:  # NIL_EXT
                return []
            case 107:  # STRING_EXT: a list of bytes
                length = self.unsigned(2)
                self._count(length)
                return list(self._take(length))
            case 108:  # LIST_EXT
                return self._list(depth)
            case 109:  # BINARY_EXT
                return bytes(self._take(self.unsigned(4)))
            case 116:  # MAP_EXT
                return self._map(depth)
            case tag:
                return self._refuse(tag, place)

    def _refuse(self, tag: int, place: int) -> NoReturn:
        if tag in _REFUSED:
            self.fail(f"{_REFUSED[tag]} (tag {tag}), which is not evaluated; save the weights without it", place)
        self.fail(f"{tag} is no tag of an Erlang term; copy the file again", place)

    def _take(self, size: int) -> memoryview:
        if size > self.left:
            self.fail(f"{size} bytes should follow and {self.left} do; copy the file again")
        self._place += size
        return self._data[self._place - size : self._place]

    def _count(self, terms: int) -> None:
        self._terms += terms
        if self._terms > _MAX_TERMS:
            self.fail(f"more than {_MAX_TERMS} terms; give a weights file")

    def _big(self, size: int) -> int:
        place = self._place
        length = self.unsigned(size)
        if length > _MAX_INTEGER_BYTES:
            self.fail(
                f"an integer of {length} bytes; at most {_MAX_INTEGER_BYTES} are read; copy the file again", place
            )
        sign = self.unsigned(1)
        if sign > 1:
            self.fail(f"{sign} is no sign of an integer; copy the file again", place)
        value = int.from_bytes(self._take(length), "little")
        return -value if sign else value

    def _float(self) -> float:
        place = self._place
        (value,) = struct.unpack(">d", self._take(8))
        if not math.isfinite(value):
            self.fail(f"the float {value}, which Erlang doesn't have; copy the file again", place)
        return float(value)

    def _atom(self, size: int, encoding: str) -> Atom:
        place = self._place
        name = self._take(self.unsigned(size))
        try:
            text = str(name, encoding)
        except UnicodeDecodeError:
            self.fail("an atom that is not UTF-8; copy the file again", place)
        if len(text) > MAX_ATOM_CHARACTERS:
            self.fail(f"an atom of {len(text)} characters, which Erlang doesn't have; copy the file again", place)
        return Atom(text)

    def _items(self, size: int, depth: int) -> list[Any]:
        length = self.unsigned(size)
        # Every term takes a byte at least.
        if length > self.left:
            self.fail(f"{length} terms should follow and only {self.left} bytes do; copy the file again")
        return [self.term(depth + 1) for _ in range(length)]

    def _list(self, depth: int) -> list[Any]:
        items = self._items(4, depth)
        if self.unsigned(1) != _NIL:
            self.fail("a list that does not end with the empty list; copy the file again", self._place - 1)
        return items

    def _map(self, depth: int) -> dict[Any, Any]:
        length = self.unsigned(4)
        if 2 * length > self.left:
            self.fail(f"{length} keys and values should follow and only {self.left} bytes do; copy the file again")
        result: dict[Any, Any] = {}
        for _ in range(length):
            place = self._place
            key = self.term(depth + 1)
            if not isinstance(key, (Atom, bytes)) and not (isinstance(key, int) and -(2**31) <= key < 2**31):
                self.fail(f"{describe(key)} as the key of a map; use atoms, binaries or small integers", place)
            if key in result:
                self.fail(f"the key {describe(key)} for the second time in a map; copy the file again", place)
            result[key] = self.term(depth + 1)
        return result


def _encode(value: Any, parts: list[bytes]) -> None:
    match value:
        case bool():
            raise TypeError(f"{value} is an atom in Erlang: give Atom({str(value).lower()!r})")
        case int():
            parts.append(_encode_integer(value))
        case float():
            if not math.isfinite(value):
                raise ValueError(f"Erlang has no float {value}")
            parts.append(struct.pack(">Bd", 70, value))
        case Atom():
            parts.append(_encode_atom(value))
        case bytes():
            parts += [struct.pack(">BI", 109, len(value)), value]
        case tuple():
            parts.append(
                struct.pack(">BB", 104, len(value)) if len(value) < 256 else struct.pack(">BI", 105, len(value))
            )
            for item in value:
                _encode(item, parts)
        case list():
            if value:
                parts.append(struct.pack(">BI", 108, len(value)))
            for item in value:
                _encode(item, parts)
            parts.append(bytes([_NIL]))
        case dict():
            parts.append(struct.pack(">BI", 116, len(value)))
            for key, item in value.items():
                _encode(key, parts)
                _encode(item, parts)
        case _:
            raise TypeError(f"a {type(value).__name__} is no Erlang term")


def _encode_integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack(">BB", 97, value)
    if -(2**31) <= value < 2**31:
        return struct.pack(">Bi", 98, value)
    size = (value.bit_length() + 7) // 8
    if size > _MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {size} bytes; at most {_MAX_INTEGER_BYTES} are written")
    return struct.pack(">BBB", 110, size, value < 0) + abs(value).to_bytes(size, "little")


def _encode_atom(atom: Atom) -> bytes:
    if len(atom) > MAX_ATOM_CHARACTERS:
        raise ValueError(f"an atom of {len(atom)} characters; Erlang has at most {MAX_ATOM_CHARACTERS}")
    # Every OTP reads both tags; this choice is OTP 25's.
    tag, name = (100, atom.encode("latin-1")) if atom.isascii() else (118, atom.encode())
    return struct.pack(">BH", tag, len(name)) + name
