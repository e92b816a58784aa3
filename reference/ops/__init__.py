"""The operators that exporters can't take apart: each a torch custom op of namespace `edifice`, see op.

Ops with a memory take what came before and give what comes after: a sequence computed in pieces, each from the state
that the last one left, is the sequence computed at once; without a state they start from zeros. In place of a sequence
they also take one frame, without the sequence axis, which is then missing in their output too.

Read-outs and queries may be fewer than the frames: they are then those of the last frames, and so is the output.

    B batch, T sequence, S key sequence, C channels, N state, K kernel, W attention width, H heads, P width of a head
"""

from __future__ import annotations

from .attention import MAX_ATTENTION_EPSILON
from .causal_attention import causal_attention
from .causal_conv1d import causal_conv1d
from .cumulative_scan import cumulative_scan
from .diagonal_scan import diagonal_scan
from .fft_conv import fft_conv
from .floored_layer_norm import floored_layer_norm
from .gated_delta_rule import gated_delta_rule
from .generalized_delta_rule import generalized_delta_rule
from .linear_attention import linear_attention
from .linear_scan import linear_scan
from .selective_scan import selective_scan
from .sliding_attention import sliding_attention
from .wkv import wkv

__all__ = [
    "MAX_ATTENTION_EPSILON",
    "causal_attention",
    "causal_conv1d",
    "cumulative_scan",
    "diagonal_scan",
    "fft_conv",
    "floored_layer_norm",
    "gated_delta_rule",
    "generalized_delta_rule",
    "linear_attention",
    "linear_scan",
    "selective_scan",
    "sliding_attention",
    "wkv",
]
