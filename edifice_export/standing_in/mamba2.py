"""mamba_ssm.modules.mamba2: the block of Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from .block import InferenceParams, State
from .causal_conv1d import short_convolution
from .computing import refuse, widened
from .gated_norm import RMSNorm
from .mamba import step_size_bias
from .mixer import StatefulMixer
from .ssd_combined import head_scan

__all__ = ["Mamba2"]


class Mamba2(StatefulMixer):
    """See mamba_ssm.modules.mamba2.Mamba2 (arXiv 2405.21060): its arguments, parameters and results.

    Frame by frame dt_limit holds as well, which the original's step leaves out.

    Args:
        d_model: width of frames.
        d_state: numbers of state of each channel.
        d_conv: frames that the convolution sees.
        conv_init: its weights are drawn up to this.
        expand: channels are so many times d_model.
        headdim: channels of a head.
        d_ssm: channels that are scanned, the others are those of a gated layer; all if None.
        ngroups: of heads, each with input weights and read-outs of its own.
        A_init_range: between what rates are drawn.
        D_has_hdim: whether D is of every channel, not of every head.
        rmsnorm: whether what is scanned is normed in groups.
        norm_before_gate: and then gated, or the other way.
        dt_min, dt_max, dt_init_floor: between what steps are drawn.
        dt_limit: the least and the most that a step may be.
        bias: whether the projections have one.
        conv_bias: whether the convolution has one.
        chunk_size, use_mem_eff_path, sequence_parallel: change no number.
        layer_idx: see StatefulMixer.
        process_group: not covered.

    Raises:
        RequestError: a process_group, or channels that are no whole heads or groups.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object | None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse("Mamba2", process_group=process_group)
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups, self.layer_idx = expand, headdim, ngroups, layer_idx
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        if self.nheads * headdim != self.d_ssm or self.nheads % ngroups:
            raise RequestError(
                f"Mamba2: {self.d_ssm} channels (d_ssm, or expand * d_model) must be whole heads of {headdim} "
                f"(headdim), and those whole groups of {ngroups} (ngroups)"
            )
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size = dt_limit, chunk_size
        self.use_mem_eff_path, self.sequence_parallel = use_mem_eff_path, sequence_parallel
        self.activation, self.act = "silu", nn.SiLU()
        read = 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + read + self.nheads, bias=bias, device=device, dtype=dtype)
        convolved = self.d_ssm + read
        self.conv1d = nn.Conv1d(
            convolved,
            convolved,
            d_conv,
            groups=convolved,
            padding=d_conv - 1,
            bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = step_size_bias(self.nheads, dt_min, dt_max, dt_init_floor)
        self.dt_bias = nn.Parameter(steps.to(device=device, dtype=dtype))
        rates = torch.empty(self.nheads, device=device, dtype=torch.float32).uniform_(*A_init_range)
        self.A_log = nn.Parameter(torch.log(rates).to(dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            group = self.d_ssm // ngroups
            self.norm = RMSNorm(self.d_ssm, 1e-5, group, norm_before_gate, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """[batch, sequence, d_model] to the same; with inference_params states are kept, and then one token taken.

        With seqlen both are [batch * sequence, d_model].

        Raises:
            RequestError: seq_idx or cu_seqlens, which are not covered.
        """
        refuse("Mamba2", seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if seqlen is None:
            return self._forward(u, inference_params)
        return self._forward(u.view(-1, seqlen, u.shape[-1]), inference_params).flatten(0, 1)

    def _mix(self, hidden_states: Tensor, state: State | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        read, others = self.ngroups * self.d_state, self.d_inner - self.d_ssm
        parts = [others, others, self.d_ssm, self.d_ssm + 2 * read, self.nheads]
        opened, held, gate, frames, dt = self.in_proj(hidden_states).split(parts, dim=-1)
        past, before = (None, None) if state is None else (state["conv"], state["ssm"])
        mixed, conv = short_convolution(frames, self.conv1d.weight.squeeze(1), self.conv1d.bias, past)
        x, b, c = torch.split(functional.silu(mixed), [self.d_ssm, read, read], dim=-1)
        x, b, c, step, bias, rates, initial = widened(x, b, c, dt, self.dt_bias, self.A_log, before)
        delta = functional.softplus(step + bias)
        if tuple(self.dt_limit) != (0.0, math.inf):
            delta = delta.clamp(*self.dt_limit)
        x, b, c = (
            x.unflatten(-1, (self.nheads, -1)),
            b.unflatten(-1, (self.ngroups, -1)),
            c.unflatten(-1, (self.ngroups, -1)),
        )
        y, ssm = head_scan(x, delta, -torch.exp(rates), b, c, initial)
        skip = self.D.view(self.nheads, -1)  # of heads, or of all their channels
        y = (y + skip * x).flatten(-2).to(hidden_states.dtype)
        y = self.norm(y, gate) if self.rmsnorm else y * functional.silu(gate)
        if others:
            y = torch.cat([functional.silu(opened) * held, y], dim=-1)
        return self.out_proj(y), {"conv": conv, "ssm": ssm}, frames

    def _state_shape(self) -> tuple[int, ...]:
        return self.nheads, self.headdim, self.d_state
