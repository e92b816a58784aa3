"""What a checkpoint says, whatever its format: tensors, whose they are, and of which model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import Shapes
from edifice_reference.models.registry import ARCHITECTURES, Architecture

from .sources import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONVERTED", "Checkpoint", "describe_weights", "dtype_of", "hash_tensors", "recognise"]

CONVERTED = {"bfloat16": "upcast", "float16": "upcast", "float64": "rounded"}
"""What becomes of tensors of other types, as models are float32."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors and what is said of the model they belong to.

    Attributes:
        place: where they are, as messages say it: a path, or `state_dict`.
        files: that were read; none of a state_dict in memory. The first is the one that was named.
        tensors: by name: this project's own (`blocks.0.norm.weight`) or Edifice's (`hymba_block_1_norm/gamma`).
        source: whose names and layouts they have.
        prefix: what all names had before them, such as `_orig_mod.`
        architecture: the architecture that they say they were made with, or None.
        options: the options that they say they were made with, or None.
        numerics: the numerics to use unless others are asked for.
    """

    place: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    source: Source
    prefix: str
    architecture: Architecture | None
    options: Mapping[str, Any] | None
    numerics: str

    def shapes(self, architecture: Architecture) -> Shapes:
        """Shapes of the tensors by the names and in the layout of a reference model; tensors not of it are left out."""
        shapes = {}
        for name, tensor in self.tensors.items():
            own = self.source.own(name, architecture)
            if own is not None:
                shapes[own] = tuple(self.source.lay_out(tensor, own).shape)
        return shapes

    def entry(self) -> dict[str, Any]:
        """What a manifest says of them: where they are from, and what was done to them."""
        entry: dict[str, Any] = {"source": "state_dict", "sha256": hash_tensors(self.tensors)}
        if self.files:
            named, *shards = self.files
            entry = {"source": named.name, "sha256": _hash_file(named)}
            if shards:
                entry["shards"] = {shard.name: _hash_file(shard) for shard in shards}
        return entry | self.changes()

    def changes(self) -> dict[str, Any]:
        """What is done to names, and to the types of how many tensors (see CONVERTED)."""
        converted = Counter(dtype_of(tensor) for tensor in self.tensors.values())
        del converted["float32"]
        changes = {"prefix": self.prefix, "converted": dict(sorted(converted.items()))}
        return {name: value for name, value in changes.items() if value}


def describe_weights(entry: Mapping[str, Any]) -> str | None:
    """A sentence on what was done to names and types, of what Checkpoint.changes or .entry says; None if nothing."""
    said = [f"names without the {entry['prefix']} that all begin with"] if "prefix" in entry else []
    for dtype, count in entry.get("converted", {}).items():
        said.append(f"{count} {dtype} tensor{'s' if count > 1 else ''} {CONVERTED[dtype]} to float32")
    return f"weights: {', '.join(said)}" if said else None


def recognise(checkpoint: Checkpoint) -> Architecture | None:
    """The one architecture that knows the most of a checkpoint's names; None if none or several do."""
    known = {
        architecture.name: sum(checkpoint.source.knows(name, architecture) for name in checkpoint.tensors)
        for architecture in ARCHITECTURES.values()
    }
    most = max(known.values(), default=0)
    best = [name for name, count in known.items() if count == most]
    return ARCHITECTURES[best[0]] if most and len(best) == 1 else None


def dtype_of(tensor: Tensor) -> str:
    """The type of a tensor, such as bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of the names, types, shapes and numbers, in whatever order they come."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {dtype_of(tensor)} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
