"""safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import brief
from .error import FormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["encode_safetensors", "read_safetensors", "write_safetensors"]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FormatError: the file is truncated, damaged, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"damaged, truncated or not safetensors ({brief(error)}); copy it again") from error
    return tensors, metadata


def encode_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of tensors under their names, with metadata; the bytes depend on nothing else."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    # The library writes metadata in an order that changes from run to run: write the header again, in order.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if metadata:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    else:
        header.pop("__metadata__", None)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, int]:
    """Writes a safetensors file of tensors in their order, without a copy of them; gives where in it each begins."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, end = {}, 0
    for name, array in tensors.items():
        offsets[name], end = end, end + array.nbytes
        dtype = _NAMES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


_NAMES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors call numpy's types."""
