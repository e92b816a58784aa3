"""Truncations and flipped bytes of the sample containers: every one that is not among raw numbers, and many there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from edifice_export.errors import RequestError
from edifice_export.weights import read_checkpoint

CONTAINERS = sorted((GOLDEN / "containers").iterdir())
DESCRIPTION = 8448
"""Bytes of the longest description among the samples; behind it are raw numbers, all alike, unless compressed."""
STRIDE = 32
PARTS = 2


def read(content: bytes, path: Path) -> dict[str, Tensor] | None:
    """The tensors, or None if they were refused with the one error there is for this."""
    path.write_bytes(content)
    try:
        return dict(read_checkpoint(path).tensors)
    except RequestError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("source", CONTAINERS, ids=lambda path: path.name)
def test_damage_is_refused_or_read_right(source: Path, part: int, tmp_path: Path) -> None:
    """One changed byte may change a name, which loading into a model refuses, or one raw number, and nothing else."""
    content, path = source.read_bytes(), tmp_path / "damaged"
    right = read(content, path)
    assert right is not None
    numbers = torch.cat([right[name].flatten().view(torch.int32) for name in sorted(right)])
    compressed = "zlib" in source.name
    places = [*range(DESCRIPTION), *range(DESCRIPTION, len(content), 1 if compressed else STRIDE), len(content) - 1]
    for place in places[part::PARTS]:
        assert read(content[:place], path) is None, f"{source.name} cut at byte {place} was read"
        flipped = bytearray(content)
        flipped[place] ^= 1 + place % 255
        found = read(bytes(flipped), path)
        if found is None or found.keys() != right.keys():
            continue
        for name, tensor in found.items():
            # Another type or shape is refused when it is loaded into a model.
            if (tensor.dtype, tensor.shape) != (right[name].dtype, right[name].shape):
                assert tensor.dtype != torch.float32 or tensor.shape != right[name].shape
                break
        else:
            changed = torch.cat([found[name].flatten().view(torch.int32) for name in sorted(found)]) != numbers
            assert int(changed.sum()) <= 1, f"{source.name} flipped at byte {place} gave other weights"
