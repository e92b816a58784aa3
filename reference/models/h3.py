"""H3 (Hungry Hungry Hippos): two state-space models multiplied, then a short convolution.

    state_sequence [B, T, E]
          |
    input_projection                 absent if E == D
          |
    +-> norm -+-> shift (SSM) -+
    |         |                * -> conv -> silu -> out_proj -+
    |         +-> diag (SSM) --+                              |
    +-------------------------- + ----------------------------+    num_layers times
    |                           |
    +-> ffn_norm -> ffn ------- + ----------------------------+
                                |
    final_norm, last timestep -> output [B, D]

One state-space model starts with long steps and forgets soon (shift), the other with short steps and remembers (diag).
Their product is large where something recent meets something kept: a comparison of tokens, which neither can do alone.
The short convolution then sees the nearest frames exactly.

The decay of a state depends neither on the input nor on the channel: exp(-dt * exp(a_log[n])), dt = softplus(dt_log).

    B  batch              T  sequence (frames)     E  embed_dim
    D  hidden_size        N  state_size            K  conv_size

With edifice numerics the recurrence is ops.cumulative_scan, Edifice's own, which departs from the exact one the more,
the longer the window and the larger the steps; with standard numerics it is exact at any length.

References:
    Edifice.SSM.H3, whose block this is.
    Fu et al., Hungry Hungry Hippos: Towards Language Modeling with State Space Models, arXiv 2212.14052.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .backbone import Backbone
from .config import Numerics
from .h3_config import H3Config
from .layers import CausalConv1d, FeedForward, LayerNorm, softplus
from .state import State, input_free

__all__ = ["EDIFICE_NAMES", "H3", "H3Config"]

EPSILON = 1e-10
INITIAL_STEPS = {"shift": 0.01, "diag": 0.001}

EDIFICE_NAMES = {
    "input_projection": "input_projection",
    "blocks.{}.norm": "h3_block_{}_norm",
    "blocks.{}.shift.b": "h3_block_{}_shift_b",
    "blocks.{}.shift.c": "h3_block_{}_shift_c",
    "blocks.{}.shift.ssm.a_log": "h3_block_{}_shift_ssm/h3_block_{}_shift_a_log",
    "blocks.{}.shift.ssm.dt_log": "h3_block_{}_shift_ssm/h3_block_{}_shift_dt_log",
    "blocks.{}.diag.b": "h3_block_{}_diag_b",
    "blocks.{}.diag.c": "h3_block_{}_diag_c",
    "blocks.{}.diag.ssm.a_log": "h3_block_{}_diag_ssm/h3_block_{}_diag_a_log",
    "blocks.{}.diag.ssm.dt_log": "h3_block_{}_diag_ssm/h3_block_{}_diag_dt_log",
    "blocks.{}.conv": "h3_block_{}_short_conv_dw_conv",
    "blocks.{}.out_proj": "h3_block_{}_out_proj",
    "blocks.{}.ffn_norm": "h3_block_{}_ffn_norm",
    "blocks.{}.ffn.up": "h3_block_{}_ffn_up",
    "blocks.{}.ffn.down": "h3_block_{}_ffn_down",
    "final_norm": "final_norm",
}
"""Edifice's layer (or parameter) of each module (or parameter); {} is the block, from 0 here and from 1 there."""


class Discretization(nn.Module):
    """From the learned rates and step, which no input changes, to the step dt [1] and the log decay of a frame [N]."""

    def __init__(self, config: H3Config, numerics: Numerics, initial_step: float) -> None:
        super().__init__()
        self.numerics, self.initial_step = numerics, initial_step
        self.exact = numerics == "standard"
        self.a_log = nn.Parameter(torch.empty(config.state_size))
        self.dt_log = nn.Parameter(torch.empty(1))

    def initial_values(self) -> dict[str, Tensor]:
        """Edifice's: rates 1 to N, and the inverse softplus of the initial step."""
        states = torch.arange(1, self.a_log.shape[0] + 1, dtype=torch.float64)
        return {"a_log": states.log(), "dt_log": torch.tensor([math.log(math.expm1(self.initial_step))])}

    @input_free
    def forward(self) -> tuple[Tensor, Tensor]:
        """([1], [N])."""
        dt = softplus(self.dt_log, self.numerics)
        log_decay = -dt * torch.exp(self.a_log)
        return dt, log_decay if self.exact else torch.log(torch.exp(log_decay) + EPSILON)


class DiagonalSsm(nn.Module):
    """Parameters of y_t = c_t . h_t,  h_t[n] = exp(-dt * exp(a_log[n])) * h_{t-1}[n] + dt * b_t[n] * u_t."""

    def __init__(self, config: H3Config, numerics: Numerics, initial_step: float) -> None:
        super().__init__()
        self.b = nn.Linear(config.hidden_size, config.state_size)
        self.c = nn.Linear(config.hidden_size, config.state_size)
        self.ssm = Discretization(config, numerics, initial_step)


class Block(nn.Module):
    """x + out_proj(silu(conv(shift(norm(x)) * diag(norm(x))))), then x + ffn(ffn_norm(x))."""

    def __init__(self, config: H3Config, numerics: Numerics) -> None:
        super().__init__()
        d = config.hidden_size
        self.exact = numerics == "standard"
        self.norm = LayerNorm(d, numerics)
        self.shift = DiagonalSsm(config, numerics, INITIAL_STEPS["shift"])
        self.diag = DiagonalSsm(config, numerics, INITIAL_STEPS["diag"])
        self.conv = CausalConv1d(d, config.conv_size)
        self.out_proj = nn.Linear(d, d)
        self.ffn_norm = LayerNorm(d, numerics)
        self.ffn = FeedForward(d)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, batch: int) -> State:
        """`ssm`, the states of shift and of diag in one, and `conv`, zero."""
        channels, state = self.out_proj.weight.shape[0], self.shift.b.weight.shape[0]
        ssm = self.out_proj.weight.new_zeros(batch, 2, state, channels)
        return {"ssm": ssm, **self.conv.initial_state(batch)}

    def scan(self, u: Tensor, past: State) -> tuple[Tensor, State]:
        """Of the normalised input, what shift and diag give [B, T, 2, D] or [B, 2, D], and the state after it."""
        dt, log_decay = (torch.stack(pair) for pair in zip(self.shift.ssm(), self.diag.ssm(), strict=True))
        b = dt * torch.stack([self.shift.b(u), self.diag.b(u)], dim=-2)
        c = torch.stack([self.shift.c(u), self.diag.c(u)], dim=-2)
        if self.exact:
            y, ssm = ops.diagonal_scan(u, log_decay, b, c, past.get("ssm"))
            return y, {"ssm": ssm}
        return ops.cumulative_scan(u, log_decay, b, c, EPSILON), {}

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D] or [B, D], of the same shape -> and the state after it."""
        both, ssm = self.scan(self.norm(x), past)
        recent, kept = both.unbind(dim=-2)
        mixed, conv = self.conv(recent * kept, past)
        x = x + self.dropout(self.out_proj(functional.silu(mixed)))
        return x + self.dropout(self.ffn(self.ffn_norm(x))), ssm | conv


class H3(Backbone):
    """H3, from a window of frames to one output.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's layer norm and its own form of the recurrence.
    """

    def __init__(self, config: H3Config, numerics: Numerics = "standard") -> None:
        super().__init__(config, numerics, lambda: Block(config, numerics))

    def with_exact_recurrence(self) -> H3 | None:
        """A copy that differs in its recurrence alone, which is exact; None with standard numerics, where it is."""
        if self.numerics == "standard":
            return None
        exact = copy.deepcopy(self)
        for module in exact.modules():
            if isinstance(module, (Discretization, Block)):
                module.exact = True
        return exact

    @property
    def why_no_stream(self) -> str | None:
        """See Backbone.why_no_stream: Edifice's recurrence has no state."""
        if self.numerics == "standard":
            return None
        return (
            "h3 with edifice numerics has no stream: Edifice's recurrence is a quotient of products over the whole "
            "window, which no state of constant size stands for"
        )
