"""Names, types and shapes of what goes into a graph and what comes out. A symbol stands for a free dimension."""

from __future__ import annotations

import dataclasses

__all__ = ["BATCH", "SEQUENCE", "StateSpec", "TensorSpec"]

BATCH, SEQUENCE = "batch", "sequence"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph, such as state_sequence float32 [batch, sequence, 287]."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """One tensor that a stream carries from frame to frame: `<layer>.<kind>`, such as 0.ssm.

    Attributes:
        shape: the batch and, for each entry, sizes.
        initial: what fills it before the first frame: a number, or the file of the bundle (an ONNX TensorProto) that
            holds it for one entry, with a first axis of 1.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    initial: float | str

    @property
    def past(self) -> TensorSpec:
        """The graph's input."""
        return TensorSpec(f"past.{self.name}", self.dtype, self.shape)

    @property
    def present(self) -> TensorSpec:
        """The graph's output."""
        return TensorSpec(f"present.{self.name}", self.dtype, self.shape)
