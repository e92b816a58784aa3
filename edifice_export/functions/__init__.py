"""ONNX function bodies of the edifice ops: one file per op, its lowerings side by side.

Bodies use operators whose meaning is the same from opset 18 to 26, so that linking may set the version. They are plain
ONNX: any runtime runs them, and a kernel registered as edifice::<op> takes precedence where there is one.
"""

from __future__ import annotations

from typing import Any

from onnxscript import OnnxFunction

from .causal_attention import CausalAttention
from .causal_conv1d import CausalConv1d
from .cumulative_scan import CumulativeScan
from .diagonal_scan import DiagonalScan
from .fft_conv import FftConv
from .floored_layer_norm import FlooredLayerNorm
from .linear_scan import LinearScan
from .selective_scan import SelectiveScan

__all__ = ["LOWERINGS"]

LOWERINGS: dict[str, OnnxFunction[..., Any]] = {
    function.name: function
    for function in (
        CausalAttention,
        CausalConv1d,
        CumulativeScan,
        DiagonalScan,
        FftConv,
        FlooredLayerNorm,
        LinearScan,
        SelectiveScan,
    )
}
"""The body of each op of domain edifice."""
