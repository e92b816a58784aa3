"""mamba_ssm.ops.triton.ssd_combined: Mamba-2's scan of heads, and all of its block between the projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from edifice_reference import ops

from ..errors import RequestError
from .causal_conv1d import short_convolution
from .computing import activated, refuse, widened
from .gated_norm import rmsnorm_fn

__all__ = ["head_scan", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]

_NO_LIMIT = (0.0, math.inf)


def head_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence by ops.linear_attention.

    Args:
        x: [batch, sequence, heads, width], or one frame [batch, heads, width]; so for what follows.
        delta: the step [batch, sequence, heads].
        a: rates [heads].
        b: input weights of groups of heads [batch, sequence, groups, state].
        c: read-outs, likewise.
        initial: the state before the first frame [batch, heads, state, width].

    Returns:
        y like x, and the state after the last frame [batch, heads, state, width].
    """
    heads, groups = x.shape[-2], b.shape[-2]
    if groups > 1:
        b, c = (each.repeat_interleave(heads // groups, dim=-2) for each in (b, c))
    return ops.linear_attention(c, b, delta.unsqueeze(-1) * x, (delta * a).unsqueeze(-1), initial)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined.

    Args:
        x: [batch, sequence, heads, width].
        dt: the step, before bias and softplus [batch, sequence, heads].
        A: rates [heads].
        B: input weights of groups of heads [batch, sequence, groups, state].
        C: read-outs, likewise.
        chunk_size: changes no number.
        D: what goes around the scan [heads] or [heads, width].
        z: gates y by its SiLU, like x.
        dt_bias: [heads].
        initial_states: before the first frame [batch, heads, width, state].
        seq_idx: not covered; so for cu_seqlens and return_varlen_states.
        dt_softplus: whether the step is the softplus of dt.
        dt_limit: the least and the most that the step may be.
        return_final_states: whether to give the state after the last frame, too.

    Returns:
        y like x; and the state, float32 at least [batch, heads, width, state].

    Raises:
        RequestError: what is not covered.
    """
    del chunk_size
    refuse(
        "mamba_chunk_scan_combined", seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states
    )
    given, step, rates, b, c, skip, gate, bias, before = widened(x, dt, A, B, C, D, z, dt_bias, initial_states)
    step = step if bias is None else step + bias
    step = functional.softplus(step) if dt_softplus else step
    step = step if tuple(dt_limit) == _NO_LIMIT else step.clamp(*dt_limit)
    y, last = head_scan(given, step, rates, b, c, None if before is None else before.mT)
    if skip is not None:
        y = y + (skip if skip.dim() == 2 else skip.unsqueeze(-1)) * given
    y = (y if gate is None else y * functional.silu(gate)).to(x.dtype)
    return (y, last.mT) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined.

    Args:
        zxbcdt: what Mamba-2's first projection makes: two halves of a gated layer beside the scan, the gate, x, B, C
            and the step [batch, sequence, 2 * others + 2 * heads * width + 2 * groups * state + heads].
        conv1d_weight: [heads * width + 2 * groups * state, kernel].
        conv1d_bias: of as many channels.
        dt_bias: see mamba_chunk_scan_combined; so for A, D, chunk_size, initial_states, dt_limit, return_final_states.
        seq_idx: not covered.
        activation: after the convolution: None, silu or swish.
        rmsnorm_weight: of a norm in groups, gated [heads * width]; if None y is gated alone.
        rmsnorm_eps: of that norm.
        outproj_weight: of a last projection [out, others + heads * width].
        outproj_bias: [out].
        headdim: width of a head where D is [heads].
        ngroups: of heads.
        norm_before_gate: see layernorm_gated.

    Returns:
        [batch, sequence, out]; and the state after the last frame [batch, heads, width, state].

    Raises:
        RequestError: what is not covered, or no headdim where it is wanted.
    """
    refuse("mamba_split_conv1d_scan_combined", seq_idx=seq_idx)
    heads = D.shape[0]
    width = D.shape[1] if D.dim() == 2 else headdim
    if width is None:
        raise RequestError("mamba_split_conv1d_scan_combined: D is [heads], so that headdim must be given")
    channels, convolved = heads * width, conv1d_weight.shape[0]
    others = zxbcdt.shape[-1] - channels - convolved - heads
    beside, z, frames, dt = torch.split(zxbcdt, [others, channels, convolved, heads], dim=-1)
    frames, _ = short_convolution(*widened(frames, conv1d_weight, conv1d_bias))
    frames = activated(frames, activation).to(zxbcdt.dtype)
    x, b, c = torch.split(frames, [channels, *[(convolved - channels) // 2] * 2], dim=-1)
    found = mamba_chunk_scan_combined(
        torch.unflatten(x, -1, (heads, width)),
        dt,
        A,
        torch.unflatten(b, -1, (ngroups, -1)),
        torch.unflatten(c, -1, (ngroups, -1)),
        chunk_size,
        D,
        None if rmsnorm_weight is not None else torch.unflatten(z, -1, (heads, width)),
        dt_bias,
        initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y, last = found[0].flatten(-2), found[1]
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, channels // ngroups, norm_before_gate)
    if others:
        opened, held = beside.chunk(2, dim=-1)
        y = torch.cat([functional.silu(opened) * held, y], dim=-1)
    out = y if outproj_weight is None else functional.linear(y, outproj_weight, outproj_bias)
    return (out, last) if return_final_states else out
