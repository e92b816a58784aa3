"""safetensors: this project's own weights, and parameters exported from Edifice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import brief
from .error import FormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["encode_safetensors", "read_safetensors"]

_RECORDED = ("state_sequence", "output", "output_f64")
"""Names of an input and its outputs that an exporter may have recorded beside the parameters."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and metadata of a safetensors file; Edifice's `layer.param` names become `layer/param`.

    A recorded example (state_sequence, output) beside the parameters is left out.

    Raises:
        FormatError: the file is truncated, damaged, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys() if name not in _RECORDED}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"damaged, truncated or not safetensors ({brief(error)}); copy it again") from error
    return _with_slashes(tensors), metadata


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


def _with_slashes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = ("kernel", "gamma", "beta")
    dotted = not any("/" in name for name in tensors) and any(name.rpartition(".")[2] in leaves for name in tensors)
    return {name.replace(".", "/", 1): tensor for name, tensor in tensors.items()} if dotted else tensors
