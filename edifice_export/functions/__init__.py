"""ONNX function bodies of the edifice ops: one file per op, its lowerings side by side.

Bodies use operators whose meaning is the same from opset 18 to 26, so that linking may set the version. They are plain
ONNX: any runtime runs them, and a kernel that is registered under a body's name (see body_names) goes before it.
"""

from __future__ import annotations

from onnxscript import OnnxFunction

from . import (
    blocked_scan,
    causal_attention,
    causal_conv1d,
    cumulative_scan,
    diagonal_scan,
    fft_conv,
    floored_layer_norm,
    linear_scan,
    selective_scan,
    sliding_attention,
)
from .lowering import Body, Op

__all__ = ["HELPERS", "LOWERINGS"]

LOWERINGS: dict[str, Op] = {
    "CausalAttention": causal_attention.OP,
    "CausalConv1d": causal_conv1d.OP,
    "CumulativeScan": cumulative_scan.OP,
    "DiagonalScan": diagonal_scan.OP,
    "FftConv": fft_conv.OP,
    "FlooredLayerNorm": floored_layer_norm.OP,
    "LinearScan": linear_scan.OP,
    "SelectiveScan": selective_scan.OP,
    "SlidingAttention": sliding_attention.OP,
}
"""Of each op of domain edifice."""

_BODIES = {lowering.body.name for op in LOWERINGS.values() for lowering in op.lowerings}

HELPERS: dict[str, Body] = {
    name: value
    for module in (
        blocked_scan,
        causal_attention,
        causal_conv1d,
        diagonal_scan,
        fft_conv,
        linear_scan,
        selective_scan,
        sliding_attention,
    )
    for name, value in vars(module).items()
    if isinstance(value, OnnxFunction) and name not in _BODIES
}
"""Functions that bodies call."""
