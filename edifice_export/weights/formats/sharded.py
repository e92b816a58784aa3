"""An index of safetensors in several files, model.safetensors.index.json: which tensor is in which of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import brief
from .error import FormatError
from .safetensors import read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_index", "read_shards"]

_MAX_INDEX = 2**24
"""Bytes of an index: those of ten thousand tensors take one million."""


def read_index(path: Path) -> dict[Path, set[str]]:
    """The names of the tensors in each file, of those beside the index.

    Raises:
        FormatError: it is no index, or names a file that is not beside it.
    """
    if path.stat().st_size > _MAX_INDEX:
        raise FormatError(f"is an index of more than {_MAX_INDEX} bytes; give a smaller one")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is JSON, as an index of shards, and damaged: {brief(error)}; copy it again") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise FormatError("is JSON and no index of safetensors: it has no weight_map; give the file with the tensors")
    shards: dict[Path, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or file in ("", ".", "..") or any(letter in file for letter in "/\\:\0"):
            raise FormatError(f"has {name:.100} in {file!r:.100}; shards are files beside their index")
        shards.setdefault(path.with_name(file), set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise FormatError(f"there is no {shard.name} beside it; copy all shards")
    return shards


def read_shards(shards: dict[Path, set[str]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of all files.

    Raises:
        FormatError: a file is damaged, lacks a tensor or has one that the index doesn't name, or two say other things.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, names in shards.items():
        try:
            found, said = read_safetensors(shard)
        except FormatError as error:
            raise FormatError(f"{shard.name}: {error}") from error
        odd = sorted(names ^ found.keys())
        if odd:
            whose = "the index has it there" if odd[0] in names else "the index doesn't"
            raise FormatError(
                f"{shard.name} {'lacks' if odd[0] in names else 'has'} {odd[0]:.100}, and {whose}; copy all again"
            )
        for key, value in said.items():
            if metadata.setdefault(key, value) != value:
                raise FormatError(f"{shard.name}: says another {key:.100} than the shards before; save them together")
        tensors |= found
    return tensors, metadata
