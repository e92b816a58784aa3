"""Parameters as Elixir's `Nx.serialize` writes them: a map of layers, or Axon's ModelState around one.

    "nx"  version 1  endianness 0 (little)  u64 size, big-endian  term of that size  buffers, one behind the other

The term is `{module, [{key, term}], meta}` for a container and
`{:t, shape, {kind, bits}, axis names, vectorized axes, offset, size}` for a tensor, with its place in the buffers.

Source: https://github.com/elixir-nx/nx (`Nx.serialize/2`, `Nx.Container`) and https://github.com/elixir-nx/axon
(`Axon.ModelState`)
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from . import etf
from .error import FormatError
from .etf import Atom, describe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_nx", "write_axon", "write_nx"]

_HEADER = struct.Struct(">2sBBQ")
_MAGIC = b"nx"
_VERSION = 1
_LITTLE_ENDIAN = 0

_MAP = Atom("Elixir.Nx.Container.Map")
_AXON = Atom("Elixir.Nx.Container.Axon.ModelState")
_OK = Atom("ok")

_DTYPES = {
    ("f", 16): "float16",
    ("bf", 16): "bfloat16",
    ("f", 32): "float32",
    ("f", 64): "float64",
    ("s", 8): "int8",
    ("s", 16): "int16",
    ("s", 32): "int32",
    ("s", 64): "int64",
    ("u", 8): "uint8",
    ("u", 16): "uint16",
    ("u", 32): "uint32",
    ("u", 64): "uint64",
}
"""torch's name of each of Nx's types."""

_MAX_RANK = 32
_MAX_NAME = 512
"""Characters of a tensor's name with those of the maps around it, which are repeated for each of their tensors."""

_MAX_ELEMENTS = 2**40
"""What the dimensions that are not zero may multiply to: torch computes strides from them, elements or not."""

_SORTED_KEYS = 32
"""Erlang keeps the keys of maps up to this size in order, and those of larger ones in the order of a hash."""

_Tree: TypeAlias = "dict[str, Tensor | _Tree]"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What the term says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_nx(data: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of `Nx.serialize`'s bytes, by the keys that lead to them: `hymba_block_1_norm/gamma`.

    Of an Axon.ModelState these are the tensors of `data`. The tensors must fill the buffers exactly and in their order,
    as Nx writes them; those returned have memory of their own.

    Raises:
        FormatError: the bytes are damaged, are something else, or hold what torch doesn't have.
    """
    term, buffers = _split(memoryview(data).cast("B"))
    entries = list(_entries(_parameters_of(term), ""))
    end = 0
    for entry in entries:
        if entry.offset != end:
            raise FormatError(
                f"{entry.name}: its bytes begin at {describe(entry.offset)} of the buffers and should begin at {end}, "
                "where those of the tensor before end; copy the file again"
            )
        end += entry.size
    if end != len(buffers):
        raise FormatError(f"the tensors take {end} bytes and the buffers have {len(buffers)}; copy the file again")
    return {entry.name: _tensor(entry, buffers) for entry in entries}


def write_nx(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors named `layer/param` as `Nx.serialize` writes the map `%{"layer" => %{"param" => tensor}}`.

    Maps of up to 32 keys are written in order, as Erlang has them. Larger ones are in the order of `tensors`: Erlang's
    is that of a hash, and Nx reads any. So what was read is written as the same bytes again, if OTP 25 made them.

    Raises:
        FormatError: a name or a dtype that Nx can't hold, or a name that is also that of a map of tensors.
    """
    buffers: list[bytes] = []
    return _join(_container(_tree(tensors), "", buffers, 0)[0], buffers)


def write_axon(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors named `layer/param` as `Nx.serialize` writes an Axon.ModelState in which all of them are trainable.

    Raises:
        FormatError: as for `write_nx`, or a tensor that is in no layer.
    """
    tree = _tree(tensors)
    for name, value in tree.items():
        if not isinstance(value, dict):
            raise FormatError(f"{name}: a tensor outside every layer, which Axon doesn't have; name it layer/param")
    buffers: list[bytes] = []
    data, _ = _container(tree, "", buffers, 0)
    meta = [
        (Atom("parameters"), _parameter_names(tree, "")),
        (Atom("state"), {}),
        (Atom("frozen_parameters"), {}),
    ]
    return _join((_AXON, [(Atom("data"), data)], meta), buffers)


def _split(view: memoryview) -> tuple[Any, memoryview]:
    if len(view) < _HEADER.size:
        raise FormatError(f"ends in the header of {_HEADER.size} bytes, at byte {len(view)}; copy the file again")
    magic, version, endianness, size = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise FormatError(
            f"begins with {magic!r} and not with {_MAGIC!r}, as what Nx.serialize of Nx 0.6 or later writes; save the "
            "parameters again with that"
        )
    if version != _VERSION:
        raise FormatError(
            f"byte 2: version {version} of Nx.serialize; only {_VERSION} is known; save it with another Nx"
        )
    if endianness != _LITTLE_ENDIAN:
        raise FormatError(
            f"byte 3: endianness {endianness}: tensors from a big-endian machine are not read; save them on a "
            "little-endian one"
        )
    if size > len(view) - _HEADER.size:
        left = len(view) - _HEADER.size
        raise FormatError(f"byte 4: {size} bytes should describe the tensors and {left} follow; copy the file again")
    end = _HEADER.size + size
    return etf.decode(view[_HEADER.size : end], _HEADER.size), view[end:]


def _parameters_of(term: Any) -> Any:
    match term:
        case (Atom() as module, [(Atom() as key, parameters)], list()) if module == _AXON and key == "data":
            return parameters
        case (Atom() as module, _, _) if module == _MAP:
            return term
        case _:
            raise FormatError(f"holds {describe(term)}; save the parameters as a map of layers or an Axon.ModelState")


def _entries(term: Any, prefix: str) -> Iterator[_Entry]:
    where = prefix.removesuffix("/") or "the outermost map"
    match term:
        case (Atom() as module, list() as pairs, Atom() as meta) if module == _MAP and meta == _OK:
            names = set()
        case _:
            raise FormatError(f"{where}: {describe(term)} in place of a map of tensors; save a plain map of layers")
    for pair in pairs:
        match pair:
            case (bytes() as key, (Atom() as kind, *_) as value):
                name = prefix + _key(key, prefix)
            case _:
                raise FormatError(
                    f"{where}: {describe(pair)} in place of a binary with a tensor or a map; save a plain map of layers"
                )
        if name in names:
            raise FormatError(f"{name}: for the second time; copy the file again")
        names.add(name)
        if kind == "t":
            yield _entry(value, name)
        else:
            yield from _entries(value, f"{name}/")


def _key(key: bytes, prefix: str) -> str:
    try:
        name = key.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{prefix}{describe(key)}: a name that is not UTF-8; copy the file again") from error
    _check_key(name, prefix)
    return name


def _check_key(name: str, prefix: str) -> None:
    if not name or not name.isprintable() or "/" in name:
        raise FormatError(f"{prefix}{name[:60]!r}: a name must be printable, not empty, without '/'; rename it")
    if len(prefix) + len(name) > _MAX_NAME:
        raise FormatError(f"{(prefix + name)[:60]}...: a name of more than {_MAX_NAME} characters; give a shorter one")


def _entry(term: tuple[Any, ...], name: str) -> _Entry:
    match term:
        case (_, tuple() as shape, (Atom() as kind, int() as bits), list() as axes, list() as vectorized, offset, size):
            pass
        case _:
            raise FormatError(f"{name}: {describe(term)} is no description of a tensor; copy the file again")
    if vectorized:
        raise FormatError(f"{name}: vectorized axes are not read; save it after Nx.devectorize")
    dtype = _DTYPES.get((kind, bits))
    if dtype is None:
        known = ", ".join(f"{kind}{bits}" for kind, bits in _DTYPES)
        raise FormatError(f"{name}: type {{{describe(kind)}, {bits}}} is not one of {known}; save it as one of these")
    if len(shape) > _MAX_RANK or not all(isinstance(dimension, int) and dimension >= 0 for dimension in shape):
        raise FormatError(f"{name}: {describe(shape)} is no shape of up to {_MAX_RANK} axes; copy the file again")
    if len(axes) != len(shape) or not all(isinstance(axis, Atom) for axis in axes):
        raise FormatError(f"{name}: {describe(axes)} are no names of {len(shape)} axes; copy the file again")
    expected = math.prod(shape) * bits // 8
    if not isinstance(offset, int) or size != expected or math.prod(max(1, n) for n in shape) > _MAX_ELEMENTS:
        raise FormatError(
            f"{name}: {describe(size)} bytes at {describe(offset)} don't hold {kind}{bits} of shape "
            f"{str(list(shape))[:80]}; copy the file again"
        )
    return _Entry(name, dtype, shape, offset, expected)


def _tensor(entry: _Entry, buffers: memoryview) -> Tensor:
    import torch

    dtype = getattr(torch, entry.dtype)
    if not entry.size:
        return torch.empty(entry.shape, dtype=dtype)
    # A copy, so that torch may write to it and finds it aligned.
    copy = bytearray(buffers[entry.offset : entry.offset + entry.size])
    return torch.frombuffer(copy, dtype=dtype).reshape(entry.shape)


def _tree(tensors: Mapping[str, Tensor]) -> _Tree:
    tree: _Tree = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split("/")
        node, prefix = tree, ""
        for key in path:
            _check_key(key, prefix)
            child = node.setdefault(key, {})
            prefix += f"{key}/"
            if not isinstance(child, dict):
                raise FormatError(f"{name}: there is also a tensor {prefix[:-1]}; rename one of them")
            node = child
        _check_key(leaf, prefix)
        if leaf in node:
            raise FormatError(f"{name}: there are also tensors below it; rename one of them")
        node[leaf] = tensor
    return tree


def _container(tree: _Tree, prefix: str, buffers: list[bytes], offset: int) -> tuple[Any, int]:
    """The term for a map, and where its last buffer ends."""
    pairs: list[tuple[bytes, Any]] = []
    for name in sorted(tree, key=str.encode) if len(tree) <= _SORTED_KEYS else tree:
        value = tree[name]
        if isinstance(value, dict):
            term, offset = _container(value, f"{prefix}{name}/", buffers, offset)
        else:
            buffer = _bytes(value)
            buffers.append(buffer)
            kind, bits = _type(value, prefix + name)
            axes = [Atom("nil")] * value.ndim
            term = (Atom("t"), tuple(value.shape), (kind, bits), axes, [], offset, len(buffer))
            offset += len(buffer)
        pairs.append((name.encode(), term))
    return (_MAP, pairs, _OK), offset


def _type(tensor: Tensor, name: str) -> tuple[Atom, int]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    for (kind, bits), known in _DTYPES.items():
        if known == dtype:
            return Atom(kind), bits
    raise FormatError(f"{name}: Nx has no {dtype}; convert it to one of {', '.join(_DTYPES.values())}")


def _bytes(tensor: Tensor) -> bytes:
    import torch

    if not tensor.numel():
        return b""
    # A copy, since a view as bytes needs a stride of 1, which not every contiguous tensor of one element has.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def _parameter_names(tree: _Tree, prefix: str) -> Any:
    maps = {name: value for name, value in tree.items() if isinstance(value, dict)}
    if prefix and not maps:
        return [name.encode() for name in sorted(tree)]
    if len(maps) < len(tree):
        raise FormatError(f"{prefix[:-1]}: has both tensors and maps of tensors, which Axon doesn't have")
    names = sorted(maps, key=str.encode) if len(maps) <= _SORTED_KEYS else list(maps)
    return {name.encode(): _parameter_names(maps[name], f"{prefix}{name}/") for name in names}


def _join(term: Any, buffers: list[bytes]) -> bytes:
    data = etf.encode(term)
    return b"".join([_HEADER.pack(_MAGIC, _VERSION, _LITTLE_ENDIAN, len(data)), data, *buffers])
