"""mamba_ssm.ops.selective_scan_interface: Mamba's scan, and all of a Mamba block around it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edifice_reference import ops

from ..errors import RequestError
from .causal_conv1d import short_convolution
from .computing import grouped_scan, widened
from .layer_norm import rms_norm_fn

__all__ = [
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mamba_ssm.ops.selective_scan_interface.selective_scan_fn, and ops.selective_scan for what it computes.

    Args:
        u: [batch, channels, sequence].
        delta: the step, before bias and softplus [batch, channels, sequence].
        A: rates [channels, state].
        B: [batch, state, sequence], in groups [batch, groups, state, sequence], or the same at every frame
            [channels, state].
        C: likewise.
        D: what goes around the scan [channels].
        z: gates y by its SiLU [batch, channels, sequence].
        delta_bias: [channels].
        delta_softplus: whether the step is the softplus of delta.
        return_last_state: whether to give it, too.

    Returns:
        y like u; and the state after the last frame, float32 at least [batch, channels, state].

    Raises:
        RequestError: numbers are complex.
    """
    if any(value.is_complex() for value in (A, B, C)):
        raise RequestError("selective_scan_fn: its stand-in takes real A, B and C; these are complex")
    x, step, rates, b, c, skip, gate, bias = widened(u, delta, A, B, C, D, z, delta_bias)
    x, step = x.transpose(1, 2), step.transpose(1, 2)
    step = step if bias is None else step + bias
    step = functional.softplus(step) if delta_softplus else step
    scan = _scan_of_constants if B.dim() == 2 or C.dim() == 2 else _scan
    y, last = scan(x, step, rates, _by_frame(b), _by_frame(c))
    y = y if skip is None else y + skip * x
    y = y if gate is None else y * functional.silu(gate.transpose(1, 2))
    out = y.transpose(1, 2).to(u.dtype)
    return (out, last) if return_last_state else out


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """mamba_inner_fn without its last projection, as Vim has it.

    Returns:
        y [batch, channels, sequence].
    """
    del checkpoint_lvl  # what a kernel keeps for its gradients
    rank, state = delta_proj_weight.shape[1], A.shape[-1]
    x, z = xz.chunk(2, dim=1)
    taps = conv1d_weight.squeeze(1)
    frames, _ = short_convolution(*widened(x.transpose(1, 2), taps, conv1d_bias))
    frames = functional.silu(frames).to(x.dtype)
    read = functional.linear(frames, x_proj_weight)
    delta = _normed(functional.linear(read[..., :rank], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        own = read[..., rank : rank + state]
        own = own if B_proj_bias is None else own + B_proj_bias
        B = _normed(own, b_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    if C is None:
        own = read[..., read.shape[-1] - state :]
        own = own if C_proj_bias is None else own + C_proj_bias
        C = _normed(own, c_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    y = selective_scan_fn(frames.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """See mamba_ssm.ops.selective_scan_interface.mamba_inner_fn: a Mamba block but for its first projection.

    Args:
        xz: what is convolved and scanned, and what gates it [batch, 2 * channels, sequence].
        conv1d_weight: [channels, 1, kernel].
        conv1d_bias: [channels].
        x_proj_weight: makes the step (rank numbers), B and C (state each) [rank + 2 * state, channels].
        delta_proj_weight: [channels, rank].
        out_proj_weight: [width, channels].
        out_proj_bias: [width].
        A: see selective_scan_fn; so for B and C, which are made if None, D, delta_bias and delta_softplus.
        B_proj_bias: added to the B that is made [state].
        C_proj_bias: likewise.
        checkpoint_lvl: changes no number.
        b_rms_weight: of a norm of the B that is made [state].
        c_rms_weight: likewise.
        dt_rms_weight: likewise of the step, before its bias [channels].
        b_c_dt_rms_eps: of these norms.

    Returns:
        [batch, sequence, width].

    Raises:
        RequestError: numbers are complex.
    """
    parts = (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl)
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps)
    y = mamba_inner_fn_no_out_proj(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, *parts, *norms)
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


selective_scan_ref = selective_scan_fn
mamba_inner_ref = mamba_inner_fn


def _by_frame(weights: Tensor) -> Tensor:
    """Input weights or read-outs as [batch, sequence, groups, state]; those of no frame as they are."""
    if weights.dim() == 2:
        return weights
    grouped = weights.unsqueeze(1) if weights.dim() == 3 else weights
    return grouped.permute(0, 3, 1, 2)


def _scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the last state [batch, channels, state]."""
    groups = max(b.shape[2], c.shape[2])
    b, c = (each.repeat_interleave(groups // each.shape[2], dim=2) for each in (b, c))
    y, last = grouped_scan(delta * x, delta, a, b, c)
    return y, last.transpose(1, 2)


def _scan_of_constants(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a channel has input weights or read-outs of its own: every number of the state is a channel."""
    channels, state = a.shape
    b, c = (each if each.dim() == 2 else each.repeat_interleave(channels // each.shape[2], dim=2) for each in (b, c))
    held = ((delta * x).unsqueeze(-1) * b).flatten(2)
    h, last = ops.linear_scan(held, (delta.unsqueeze(-1) * a).flatten(2))
    return (h.reshape(*h.shape[:-1], channels, state) * c).sum(-1), last.reshape(-1, channels, state)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    normed = rms_norm_fn(x, weight, None, eps=eps)
    assert isinstance(normed, Tensor)
    return normed
