"""Settings: what is asked of every bundle, whatever is exported."""

from __future__ import annotations

import dataclasses

from ..arguments import flag, positive, text, whole_number
from ..defaults import DEFAULT_OPSET, OPSETS, PRECISIONS, TARGETS, TOLERANCE

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How graphs are made and verified.

    Attributes:
        target: what the graphs are made fast for, one of defaults.TARGETS; they are right everywhere.
        optimize: whether to apply the graph passes; the plain graph is for debugging.
        inline: whether to put the nodes of bodies in the place of their calls: plain graphs without functions, for
            tools that don't read them. Kernels under the ops' names don't run in these.
        opset: version of the ONNX operator set.
        seed: of the test data, and of fresh weights.
        tolerance: largest error allowed, see defaults.TOLERANCE.
        precision: the type that the graphs compute in, one of defaults.PRECISIONS.

    Raises:
        RequestError: one of them can't be.
    """

    target: str = "portable"
    optimize: bool = True
    inline: bool = False
    opset: int = DEFAULT_OPSET
    seed: int = 0
    tolerance: float = TOLERANCE
    precision: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        text("target", self.target, TARGETS)
        text("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "optimize", flag("optimize", self.optimize))
        object.__setattr__(self, "inline", flag("inline", self.inline))
        object.__setattr__(self, "opset", whole_number("opset", self.opset, OPSETS[0], OPSETS[-1]))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**63 - 1))
        object.__setattr__(self, "tolerance", positive("tolerance", self.tolerance))
