"""Names, types and shapes of what goes into a graph and what comes out. A symbol stands for a free dimension."""

from __future__ import annotations

import dataclasses

__all__ = ["BATCH", "SEQUENCE", "TensorSpec"]

BATCH, SEQUENCE = "batch", "sequence"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph, such as state_sequence float32 [batch, sequence, 287]."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"
