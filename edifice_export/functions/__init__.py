"""ONNX function bodies of the edifice ops: one file per op, its lowerings side by side.

Bodies use operators whose meaning is the same from opset 18 to 26, so that linking may set the version. They are plain
ONNX: any runtime runs them, and a kernel registered as edifice::<op> takes precedence where there is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
from onnxscript import OnnxFunction

from . import sliding_attention
from .causal_attention import CausalAttention
from .causal_conv1d import CausalConv1d, CausalConv1dFrame
from .cumulative_scan import CumulativeScan
from .diagonal_scan import DiagonalScan, DiagonalScanFrame
from .fft_conv import FftConv
from .floored_layer_norm import FlooredLayerNorm
from .linear_scan import LinearScan, LinearScanFrame
from .selective_scan import SelectiveScan, SelectiveScanFrame
from .sliding_attention import (
    SlidingAttention,
    SlidingAttentionFrame,
    SlidingAttentionSinks,
    SlidingAttentionSinksFrame,
)

__all__ = ["HELPERS", "LOWERINGS", "Lowerings"]

Body = OnnxFunction[..., Any]


@dataclasses.dataclass(frozen=True)
class Lowerings:
    """The bodies of one op. The one that takes as many inputs as a node has is its lowering: some are optional.

    Attributes:
        sequence: for a sequence, or whatever else the op takes.
        frame: for one frame in place of a sequence; empty for an op that takes none.
    """

    sequence: tuple[Body, ...]
    frame: tuple[Body, ...] = ()

    def body(self, node: ir.Node) -> Body | None:
        """The body for a node, or None."""
        first = node.inputs[0]
        is_frame = first is not None and first.shape is not None and len(first.shape) == 2
        bodies = self.frame if is_frame and self.frame else self.sequence
        return next((body for body in bodies if len(body.to_function_proto().input) == len(node.inputs)), None)


LOWERINGS: dict[str, Lowerings] = {
    "CausalAttention": Lowerings((CausalAttention,)),
    "CausalConv1d": Lowerings((CausalConv1d,), (CausalConv1dFrame,)),
    "CumulativeScan": Lowerings((CumulativeScan,)),
    "DiagonalScan": Lowerings((DiagonalScan,), (DiagonalScanFrame,)),
    "FftConv": Lowerings((FftConv,)),
    "FlooredLayerNorm": Lowerings((FlooredLayerNorm,)),
    "LinearScan": Lowerings((LinearScan,), (LinearScanFrame,)),
    "SelectiveScan": Lowerings((SelectiveScan,), (SelectiveScanFrame,)),
    "SlidingAttention": Lowerings(
        (SlidingAttention, SlidingAttentionSinks), (SlidingAttentionFrame, SlidingAttentionSinksFrame)
    ),
}
"""Of each op of domain edifice."""

HELPERS: dict[str, Body] = {
    name: value for name, value in vars(sliding_attention).items() if isinstance(value, OnnxFunction)
}
"""Functions that bodies call."""
