"""State Space Transformer: a gated recurrence and attention side by side in every block, mixed by a learned gate.

    state_sequence [B, T, E]
          |
    input_projection                    absent if E == D
          |
    +-> norm -+-> ssm -------- * g -----+
    |         +-> attention -- * (1-g) -+   g = sigmoid(gate(norm))
    +-------------------- + ------------+
    |                     |                 num_layers times
    +-> ffn_norm -> ffn - + ------------+
                          |
    final_norm, last timestep -> output [B, D]

The recurrence is a running average of the frames: one number for each frame, made from the frame, says how much of the
past to keep, and another how much of the frame to let in. It costs the same for every frame; attention looks up single
frames; the gate decides for each channel how much of either to take.

    B  batch              T  sequence (frames)             E  embed_dim
    D  hidden_size        I  inner width, expand_factor D  N  state_size
    H  num_heads          P  head_dim                      K  conv_size

Options (SSTransformerConfig):
    state_size      width of the two projections whose product says how much of a frame is let in
    num_heads       heads of the attention, each head_dim wide whatever hidden_size is
    head_dim        width of one head
    expand_factor   inner width of the recurrence, in units of hidden_size
    conv_size       frames that the convolution before the recurrence sees
    dropout         in training, between blocks
    embed_dim       width of one frame; the projection to hidden_size is left out where they are equal
    hidden_size     width of the residual stream and of the output
    num_layers      blocks, one after the other
    window_size     frames that a host feeds at once, of any number; those that attention sees in a stream

References:
    Edifice.SSM.SSTransformer, whose block this is.
    Dao and Gu, Transformers are SSMs, arXiv 2405.21060: recurrences whose decay all channels share.
    Dong et al., Hymba, arXiv 2411.13676: the two paths side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .backbone import Backbone
from .config import Config, Numerics, Shapes, option, size_of
from .layers import CausalAttention, CausalConv1d, FeedForward, LayerNorm, softplus
from .state import State

__all__ = ["EDIFICE_NAMES", "SSTransformer", "SSTransformerConfig"]

EDIFICE_NAMES = {
    "input_projection": "input_projection",
    "blocks.{}.norm": "sst_block_{}_norm",
    "blocks.{}.ssm.in_proj": "sst_block_{}_ssm_in_proj",
    "blocks.{}.ssm.conv": "sst_block_{}_ssm_conv",
    "blocks.{}.ssm.b_proj": "sst_block_{}_ssm_b_proj",
    "blocks.{}.ssm.c_proj": "sst_block_{}_ssm_c_proj",
    "blocks.{}.ssm.dt_proj": "sst_block_{}_ssm_dt_proj",
    "blocks.{}.ssm.out_proj": "sst_block_{}_ssm_out_proj",
    "blocks.{}.attention.q": "sst_block_{}_attn_q",
    "blocks.{}.attention.k": "sst_block_{}_attn_k",
    "blocks.{}.attention.v": "sst_block_{}_attn_v",
    "blocks.{}.attention.out_proj": "sst_block_{}_attn_out_proj",
    "blocks.{}.gate": "sst_block_{}_gate_proj",
    "blocks.{}.ffn_norm": "sst_block_{}_ffn_norm",
    "blocks.{}.ffn.up": "sst_block_{}_ffn_up",
    "blocks.{}.ffn.down": "sst_block_{}_ffn_down",
    "final_norm": "final_norm",
}
"""Edifice's layer of each module; {} is the block, from 0 here and from 1 there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSTransformerConfig(Config):
    """Options of the State Space Transformer, with the defaults of Edifice.SSM.SSTransformer.build/1."""

    stream_ends_with_window: ClassVar[bool] = True

    num_layers: int = option(6, minimum=1, maximum=512, help="number of blocks")
    dropout: float = option(0.1, minimum=0, below=1, help="dropout rate in training; inference has none")
    state_size: int = option(16, minimum=1, maximum=1024, help="width of what decides how much of a frame is let in")
    num_heads: int = option(4, minimum=1, maximum=1024, untold=True, help="attention heads")
    head_dim: int = option(64, minimum=1, maximum=16_384, help="width of one attention head")
    expand_factor: int = option(2, minimum=1, maximum=64, help="inner width of the recurrence, times hidden_size")
    conv_size: int = option(4, minimum=1, maximum=256, help="frames that the convolution sees")

    @property
    def inner_size(self) -> int:
        """Width of the recurrence, I."""
        return self.expand_factor * self.hidden_size

    @property
    def attention_size(self) -> int:
        """Width of the attention, H P."""
        return self.num_heads * self.head_dim

    @property
    def param_count(self) -> int:
        """Number of parameters, exactly (Edifice has no formula for SSTransformer)."""
        d, i, n, a = self.hidden_size, self.inner_size, self.state_size, self.attention_size
        norm = 2 * d
        ssm = (d + 1) * 2 * i + (self.conv_size + 1) * i + 2 * (i + 1) * n + (i + 1) * i + (i + 1) * d
        attention = 3 * (d + 1) * a + (a + 1) * d
        gate = (d + 1) * d
        ffn = (d + 1) * 4 * d + (4 * d + 1) * d
        projection = (self.embed_dim + 1) * d if self.embed_dim != d else 0
        return projection + self.num_layers * (2 * norm + ssm + attention + gate + ffn) + norm

    @classmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """Edifice.SSM.SSTransformer.recommended_defaults/0: the build defaults; no window is recommended."""
        return {
            "hidden_size": 256,
            "state_size": 16,
            "num_layers": 6,
            "num_heads": 4,
            "head_dim": 64,
            "expand_factor": 2,
            "conv_size": 4,
            "dropout": 0.1,
        }

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
        """See Config.told_by."""
        told = super().told_by(shapes, given)
        d, inner = told["hidden_size"], size_of(shapes, "blocks.0.ssm.out_proj.weight", 1)
        attention, heads = size_of(shapes, "blocks.0.attention.q.weight", 0), given.get("num_heads")
        told["state_size"] = size_of(shapes, "blocks.0.ssm.b_proj.weight", 0)
        told["expand_factor"] = inner // d if d and inner else None
        told["conv_size"] = size_of(shapes, "blocks.0.ssm.conv.weight", 2)
        told["head_dim"] = attention // heads if attention and heads else None
        return told


class Ssm(nn.Module):
    """in_proj -> (x, z); out_proj(h * silu(z)), h a running average of silu(conv(x)).

        h_t = a_t * h_{t-1} + (1 - a_t) * v_t,   v_t = a_t * sigmoid(b_t . c_t) * x_t,   a_t = sigmoid(mean(dt_t))

    Edifice's stand-in for a selective scan: a_t and the product b_t . c_t are one number for each frame.
    """

    def __init__(self, config: SSTransformerConfig, numerics: Numerics) -> None:
        super().__init__()
        inner = config.inner_size
        self.numerics = numerics
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner)
        self.conv = CausalConv1d(inner, config.conv_size)
        self.b_proj = nn.Linear(inner, config.state_size)
        self.c_proj = nn.Linear(inner, config.state_size)
        self.dt_proj = nn.Linear(inner, inner)
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def initial_state(self, batch: int) -> State:
        """`ssm` and `conv`, zero."""
        weight = self.conv.weight
        return {"ssm": weight.new_zeros(batch, weight.shape[0]), **self.conv.initial_state(batch)}

    def forward(self, u: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D] or [B, D], of the same shape -> and the state after it."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = self.conv(x, past)
        x = functional.silu(x)
        kept = softplus(self.dt_proj(x), self.numerics).mean(-1, keepdim=True)
        let_in = torch.sigmoid((self.b_proj(x) * self.c_proj(x)).sum(-1, keepdim=True))
        # a = exp(log_decay) is too near 1 for float32, and so is what a runtime makes of a sigmoid of -m.
        log_decay = -functional.softplus(-kept)
        weight = torch.exp(log_decay - kept) * torch.exp(log_decay) * let_in  # (1 - a) * a * let_in
        h, ssm = ops.linear_scan(weight * x, log_decay, past.get("ssm"))
        return self.out_proj(h * functional.silu(z)), {"ssm": ssm, **conv}


class Block(nn.Module):
    """x + g * ssm(norm(x)) + (1 - g) * attention(norm(x)), then x + ffn(ffn_norm(x))."""

    def __init__(self, config: SSTransformerConfig, numerics: Numerics) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = LayerNorm(d, numerics)
        self.ssm = Ssm(config, numerics)
        self.attention = CausalAttention(d, config.attention_size, config.num_heads, config.window_size, numerics)
        self.gate = nn.Linear(d, d)
        self.ffn_norm = LayerNorm(d, numerics)
        self.ffn = FeedForward(d)

    def initial_state(self, batch: int) -> State:
        """That of both paths."""
        return self.ssm.initial_state(batch) | self.attention.initial_state(batch)

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D] or [B, D], of the same shape -> and the state after it."""
        u = self.norm(x)
        gate = torch.sigmoid(self.gate(u))
        averaged, ssm = self.ssm(u, past)
        recalled, cache = self.attention(u, past)
        x = x + (recalled + gate * (averaged - recalled))
        return x + self.ffn(self.ffn_norm(x)), ssm | cache


class SSTransformer(Backbone):
    """State Space Transformer, from a window of frames to one output.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's layer norm, softmax denominator and softplus.
    """

    def __init__(self, config: SSTransformerConfig, numerics: Numerics = "standard") -> None:
        super().__init__(config, numerics, lambda: Block(config, numerics), config.dropout)
