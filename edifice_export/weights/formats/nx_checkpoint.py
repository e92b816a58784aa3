"""Edifice's own checkpoints, `.nx`: parameters with the architecture and the options they were trained with.

    u8 compressed (0 or 1)  u32 size, big-endian  metadata, an Erlang term of that size or nothing  Nx.serialize's bytes

Where `compressed` is 1, the last part is a zlib stream. Edifice writes what it needs to build the model again, its
spec, into the metadata under "__edifice_spec__"; the rest of the metadata is the user's.

Source: https://github.com/blasphemetheus/edifice (`Edifice.Checkpoint`, `Edifice.Spec`)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import etf
from .error import FormatError
from .etf import Atom, describe
from .nx import read_nx, write_nx

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fold_width", "read_nx_checkpoint", "spec_of", "write_nx_checkpoint"]

_HEADER = struct.Struct(">BI")
_SPEC = b"__edifice_spec__"

_MAX_EXPANDED = 64 * 2**20
_MAX_EXPANSION = 32
"""A zlib stream may grow to `_MAX_EXPANDED` bytes and `_MAX_EXPANSION` times the file's: weights hardly compress."""

_WIDTH_ALIASES = ("embed_dim", "obs_size", "input_dim", "input_size", "embed_size")
"""What Edifice calls the width of a frame, one for each family of models: it writes all of them but the last, which is
older, into a spec."""

_VALUES = {"true": True, "false": False, "nil": None}
"""Atoms that are more than a name."""


def read_nx_checkpoint(data: bytes | memoryview) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a checkpoint by name, and its metadata: a term as `etf.decode` returns it, or None.

    Raises:
        FormatError: the bytes are damaged, are something else, or hold what torch doesn't have.
    """
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise FormatError(f"ends in the header of {_HEADER.size} bytes, at byte {len(view)}; copy the file again")
    compressed, size = _HEADER.unpack_from(view)
    if compressed > 1:
        raise FormatError(f"byte 0: {compressed} says neither compressed (1) nor not (0); give an Edifice checkpoint")
    if size > len(view) - _HEADER.size:
        raise FormatError(
            f"byte 1: {size} bytes of metadata should follow and {len(view) - _HEADER.size} do; copy the file again"
        )
    begin = _HEADER.size + size
    metadata = etf.decode(view[_HEADER.size : begin], _HEADER.size) if size else None
    if not compressed:
        return _read_part(view[begin:], f"in the tensors, from byte {begin}"), metadata
    expanded = _expand(view[begin:], begin, _MAX_EXPANDED + _MAX_EXPANSION * len(view))
    return _read_part(memoryview(expanded), f"in the tensors, expanded from byte {begin}"), metadata


def write_nx_checkpoint(
    tensors: Mapping[str, Tensor],
    architecture: str | None,
    options: Mapping[str, Any] | None,
    compressed: bool,
) -> bytes:
    """A checkpoint that `Edifice.Checkpoint.load` reads, and `load_model` too when architecture and options are given.

    The same arguments make the same bytes: the time and the versions that Edifice writes into a spec are left out, and
    it doesn't need them.

    Raises:
        FormatError: as for `write_nx`.
        ValueError: the name of an option is too long for an atom, or its value for Erlang.
        TypeError: an option that is not a number, a boolean, text (an atom to Edifice), None, or a list of these.
    """
    metadata = b""
    if architecture is not None and options is not None:
        spec = {
            Atom("arch"): Atom(architecture),
            Atom("build_opts"): [(Atom(name), _to_term(value)) for name, value in options.items()],
            Atom("external"): Atom("false"),
        }
        metadata = etf.encode({_SPEC: spec})
    data = write_nx(tensors)
    return _HEADER.pack(compressed, len(metadata)) + metadata + (zlib.compress(data) if compressed else data)


def spec_of(metadata: Any) -> tuple[str, dict[str, Any]] | None:
    """The architecture and the build options that Edifice wrote into a checkpoint's metadata, or None if it didn't.

    Options are as JSON has them: atoms and binaries are text, tuples are lists, and those that are nil are left out.
    The width of a frame is `embed_dim`, whatever its family calls it. Nothing else of the metadata counts, as in
    Edifice: an `architecture` beside the spec is a note of the user's. A spec marked `external` is of another library's
    model, of which Edifice's is a part and which Edifice doesn't build; it counts as none.

    Raises:
        FormatError: the spec is malformed or contradicts itself.
    """
    if not isinstance(metadata, dict) or _SPEC not in metadata:
        return None
    match metadata[_SPEC]:
        case {"arch": Atom() as architecture, "build_opts": list() as pairs, **rest} if architecture != "nil":
            if rest.get("external") == "true":
                return None
            return str(architecture), fold_width(_options(pairs))
        case spec:
            raise FormatError(
                f"metadata: {describe(spec)} is no spec with arch and build_opts; give the options yourself"
            )


def fold_width(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which the width of a frame is `embed_dim`, whatever its family calls it.

    Raises:
        FormatError: it goes by several names which differ.
    """
    given = {name: options[name] for name in _WIDTH_ALIASES if name in options}
    if not given:
        return dict(options)
    width = next(iter(given.values()))
    if not all(_same(value, width) for value in given.values()):
        found = ", ".join(f"{name} {describe(value)}" for name, value in given.items())
        raise FormatError(f"metadata: one width of a frame by several names, which differ: {found}; give embed_dim")
    return {"embed_dim": width} | {name: value for name, value in options.items() if name not in _WIDTH_ALIASES}


def _read_part(part: memoryview, where: str) -> dict[str, Tensor]:
    try:
        return read_nx(part)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


def _expand(data: memoryview, begin: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        # zlib gives back no more than it is asked for, and takes memory as it goes.
        expanded = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise FormatError(f"from byte {begin}: damaged compressed tensors ({error}); copy the file again") from error
    if len(expanded) > limit:
        raise FormatError(
            f"from byte {begin}: the compressed tensors grow beyond {limit} bytes ({_MAX_EXPANDED} and "
            f"{_MAX_EXPANSION} times the file's size); save them without compression"
        )
    if not decompressor.eof:
        raise FormatError(f"from byte {begin}: the compressed tensors end too early; copy the file again")
    if decompressor.unused_data:
        raise FormatError(
            f"{len(decompressor.unused_data)} bytes behind the compressed tensors; copy the file again, alone"
        )
    return expanded


def _options(pairs: list[Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        match pair:
            case (Atom() as name, term):
                value = _from_term(term, name)
            case _:
                raise FormatError(f"metadata: {describe(pair)} in build_opts is no option; give the options yourself")
        if name in options and not _same(options[name], value):
            raise FormatError(
                f"metadata: the option {describe(name)} is both {describe(options[name])} and {describe(value)}; give "
                "the options yourself"
            )
        options[str(name)] = value
    return {name: value for name, value in options.items() if value is not None}


def _from_term(term: Any, name: Atom) -> Any:
    match term:
        case Atom():
            return _VALUES.get(term, str(term))
        case bytes():
            try:
                return term.decode()
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"metadata: the option {describe(name)} is text that is not UTF-8; copy the file again"
                ) from error
        case list() | tuple():
            return [_from_term(item, name) for item in term]
        case int() | float():
            return term
        case _:
            raise FormatError(f"metadata: the option {describe(name)} is {describe(term)}; give the options yourself")


def _to_term(value: Any) -> Any:
    match value:
        case None:
            return Atom("nil")
        case bool():
            return Atom(str(value).lower())
        case str():
            # As a binary where an atom would be read as something else, or can't be.
            return value.encode() if value in _VALUES or len(value) > etf.MAX_ATOM_CHARACTERS else Atom(value)
        case list() | tuple():
            return [_to_term(item) for item in value]
        case _:
            return value


def _same(one: Any, other: Any) -> bool:
    # 1, 1.0 and true are equal in Python.
    return type(one) is type(other) and bool(one == other)
