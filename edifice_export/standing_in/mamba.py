"""mamba_ssm.modules.mamba_simple: the block of Mamba."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from .block import InferenceParams, State
from .causal_conv1d import short_convolution
from .computing import grouped_scan, widened
from .mixer import StatefulMixer

__all__ = ["Mamba", "step_size_bias"]


class Mamba(StatefulMixer):
    """See mamba_ssm.modules.mamba_simple.Mamba (arXiv 2312.00752): its arguments, parameters and results.

    Args:
        d_model: width of frames.
        d_state: numbers of state of each channel.
        d_conv: frames that the convolution sees.
        expand: channels are so many times d_model.
        dt_rank: numbers that the step is made of; a sixteenth of d_model, rounded up, if "auto".
        dt_min, dt_max, dt_init_floor: between what steps are drawn.
        dt_init: constant or random, how the step's projection is drawn.
        dt_scale: of its numbers.
        conv_bias: whether the convolution has one.
        bias: whether the projections have one.
        use_fast_path: changes no number.
        layer_idx: see StatefulMixer.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, device=device, dtype=dtype)
        spread = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            raise RequestError(f"dt_init must be constant or random, got {dt_init!r:.80}")
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_size_bias(self.d_inner, dt_min, dt_max, dt_init_floor))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        # Both stay in float32 whatever dtype is.
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(torch.log(rates).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """[batch, sequence, d_model] to the same; with inference_params states are kept, and then one token taken."""
        return self._forward(hidden_states, inference_params)

    def _mix(self, hidden_states: Tensor, state: State | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        frames, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        past, before = (None, None) if state is None else (state["conv"], state["ssm"])
        x, conv = short_convolution(frames, self.conv1d.weight.squeeze(1), self.conv1d.bias, past)
        x = functional.silu(x)
        read = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        step = functional.linear(read[0], self.dt_proj.weight)
        x, step, rates, b, c, initial = widened(x, step, -torch.exp(widened(self.A_log)[0]), *read[1:], before)
        delta = functional.softplus(step + self.dt_proj.bias)
        y, ssm = grouped_scan(delta * x, delta, rates, b.unsqueeze(-2), c.unsqueeze(-2), initial)
        y = (y + self.D * x) * functional.silu(gate)
        return self.out_proj(y.to(hidden_states.dtype)), {"conv": conv, "ssm": ssm}, frames

    def _state_shape(self) -> tuple[int, ...]:
        return self.d_inner, self.d_state


def step_size_bias(count: int, least: float, most: float, floor: float) -> Tensor:
    """What softplus makes steps of that are drawn evenly in their logarithm, as papers on Mamba have it."""
    steps = torch.exp(math.log(least) + torch.rand(count) * (math.log(most) - math.log(least))).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
