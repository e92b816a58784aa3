"""Hymba: a Mamba path and an attention path side by side in every block, mixed by a learned gate.

    state_sequence [B, T, E]
          |
    input_projection                        absent if E == D
          |
    +-> norm -+-> mamba ------ * g -----+
    |         +-> attention -- * (1-g) -+   g = sigmoid(fusion_gate(norm))
    |         |    ^ meta keys, values  |
    +-------------------- + ------------+
    |                     |                 num_layers times
    +-> ffn_norm -> ffn - + ------------+
                          |
    final_norm, last timestep -> output [B, D]

Both paths read the same normalised input: the state-space path summarises the past in a fixed-size state, attention
recalls single frames exactly, and the gate decides for each channel how much of either to take. Meta tokens are learned
positions before the first frame that every query sees, which gives attention something to rest on.

    B  batch              T  sequence (frames)     E  embed_dim
    D  hidden_size        I  inner width, 2 D      N  state_size
    M  num_meta_tokens    H  num_heads             R  rank of the step, max(I // 16, 1)

References:
    Edifice.SSM.Hymba, whose block this is: each layer has its own learned meta keys and values.
    Dong et al., Hymba: A Hybrid-head Architecture for Small Language Models, arXiv 2411.13676: with `meta_propagation`,
    its meta tokens: positions of the sequence itself, which prime the state-space path and change from layer to layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .backbone import Backbone
from .config import Numerics
from .hymba_config import CONV_SIZE, HymbaConfig
from .layers import CausalAttention, CausalConv1d, FeedForward, LayerNorm
from .state import State, input_free, kind_of

__all__ = ["EDIFICE_NAMES", "Hymba", "HymbaConfig"]

STEP_RANGE = (0.001, 0.1)

EDIFICE_NAMES = {
    "input_projection": "input_projection",
    "blocks.{}.norm": "hymba_block_{}_norm",
    "blocks.{}.mamba.in_proj": "hymba_block_{}_mamba_in_proj",
    "blocks.{}.mamba.conv": "hymba_block_{}_mamba_conv",
    "blocks.{}.mamba.bc_proj": "hymba_block_{}_mamba_ssm_bc_proj",
    "blocks.{}.mamba.dt_rank": "hymba_block_{}_mamba_ssm_dt_rank",
    "blocks.{}.mamba.dt_proj": "hymba_block_{}_mamba_ssm_dt_proj",
    "blocks.{}.mamba.out_proj": "hymba_block_{}_mamba_out_proj",
    "blocks.{}.attention.q": "hymba_block_{}_attn_q",
    "blocks.{}.attention.k": "hymba_block_{}_attn_k",
    "blocks.{}.attention.v": "hymba_block_{}_attn_v",
    "blocks.{}.attention.out_proj": "hymba_block_{}_attn_out_proj",
    "blocks.{}.attention.meta_k": "hymba_block_{}_attn_compute/hymba_block_{}_meta_k",
    "blocks.{}.attention.meta_v": "hymba_block_{}_attn_compute/hymba_block_{}_meta_v",
    "blocks.{}.fusion_gate": "hymba_block_{}_fusion_gate_proj",
    "blocks.{}.ffn_norm": "hymba_block_{}_ffn_norm",
    "blocks.{}.ffn.up": "hymba_block_{}_ffn_up",
    "blocks.{}.ffn.down": "hymba_block_{}_ffn_down",
    "final_norm": "final_norm",
}
"""Edifice's layer (or parameter) of each module (or parameter); {} is the block, from 0 here and from 1 there."""


class Mamba(nn.Module):
    """The state-space path: in_proj -> (x, z); out_proj(scan(silu(conv(x))) * silu(z)).

    Edifice's simplification of Mamba: the rates are fixed at -1 to -N, the step is clipped to STEP_RANGE, the MEAN of
    the step over channels scales B, and there is no skip term.
    """

    rates: Tensor

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        inner, state = config.inner_size, config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner)
        self.conv = CausalConv1d(inner, CONV_SIZE)
        self.bc_proj = nn.Linear(inner, 2 * state)
        self.dt_rank = nn.Linear(inner, config.dt_rank)
        self.dt_proj = nn.Linear(config.dt_rank, inner)
        self.out_proj = nn.Linear(inner, config.hidden_size)
        self.register_buffer("rates", -torch.arange(1.0, state + 1).unsqueeze(0), persistent=False)

    def initial_state(self, batch: int) -> State:
        """`ssm` and `conv`, zero."""
        shape = (batch, self.rates.shape[1], self.conv.weight.shape[0])
        return {"ssm": self.rates.new_zeros(shape), **self.conv.initial_state(batch)}

    def forward(self, u: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D] or [B, D], of the same shape -> and the state after it."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = self.conv(x, past)
        x = functional.silu(x)
        b, c = self.bc_proj(x).chunk(2, dim=-1)
        delta = functional.softplus(self.dt_proj(self.dt_rank(x))).clamp(*STEP_RANGE)
        y, ssm = ops.selective_scan(x, delta, self.rates, delta.mean(-1, keepdim=True) * b, c, past.get("ssm"))
        return self.out_proj(y * functional.silu(z)), {"ssm": ssm, **conv}


class Block(nn.Module):
    """x + g * mamba(norm(x)) + (1 - g) * attention(norm(x)), then x + ffn(ffn_norm(x))."""

    def __init__(self, config: HymbaConfig, numerics: Numerics) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = LayerNorm(d, numerics)
        self.mamba = Mamba(config)
        own_meta = 0 if config.meta_propagation else config.num_meta_tokens
        self.attention = CausalAttention(d, d, config.num_heads, config.window_size, numerics, own_meta)
        self.fusion_gate = nn.Linear(d, d)
        self.ffn_norm = LayerNorm(d, numerics)
        self.ffn = FeedForward(d)

    def initial_state(self, batch: int) -> State:
        """That of both paths."""
        return self.mamba.initial_state(batch) | self.attention.initial_state(batch)

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D] or [B, D], of the same shape -> and the state after it."""
        u = self.norm(x)
        gate = torch.sigmoid(self.fusion_gate(u))
        summarised, ssm = self.mamba(u, past)
        recalled, cache = self.attention(u, past)
        x = x + (recalled + gate * (summarised - recalled))
        return x + self.ffn(self.ffn_norm(x)), ssm | cache


class Hymba(Backbone):
    """Hymba, from a window of frames to one output.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's layer norm and softmax denominator.
    """

    def __init__(self, config: HymbaConfig, numerics: Numerics = "standard") -> None:
        super().__init__(config, numerics, lambda: Block(config, numerics), config.dropout)
        self.propagates = config.meta_propagation and config.num_meta_tokens > 0
        if self.propagates:
            self.meta_tokens = nn.Parameter(torch.empty(config.num_meta_tokens, config.hidden_size))

    @input_free
    def after_meta_tokens(self) -> State:
        """Of propagated meta tokens: the state that they leave, and their keys and values, which every frame sees."""
        if not self.propagates:
            return {}
        _, state = self.run_blocks(self.meta_tokens[None], {})
        sinks = {name: state.pop(name)[0] for name in list(state) if kind_of(name) in ("key", "value")}
        return state | {name.replace(".", ".sink_"): value for name, value in sinks.items()}

    def start(self, batch: int) -> State:
        """See Backbone.start: propagated meta tokens have been through every block."""
        zeros, primed = super().start(batch), self.after_meta_tokens()
        return {name: primed[name].expand_as(value) if name in primed else value for name, value in zeros.items()}

    def before_window(self) -> State:
        """See Backbone.before_window: what propagated meta tokens leave."""
        return {name: value for name, value in self.after_meta_tokens().items() if "sink" not in kind_of(name)}

    def constants(self) -> State:
        """See Backbone.constants: `sink_key` and `sink_value` of propagated meta tokens, [M, D]."""
        return {name: value for name, value in self.after_meta_tokens().items() if "sink" in kind_of(name)}
