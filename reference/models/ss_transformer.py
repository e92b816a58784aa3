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

References:
    Edifice.SSM.SSTransformer, whose block this is.
    Dao and Gu, Transformers are SSMs, arXiv 2405.21060: recurrences whose decay all channels share.
    Dong et al., Hymba, arXiv 2411.13676: the two paths side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .backbone import Backbone
from .config import Numerics
from .layers import CausalAttention, CausalConv1d, FeedForward, LayerNorm, softplus
from .ss_transformer_config import SSTransformerConfig
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
