"""mamba_ssm.ops.triton.selective_state_update: one frame of a scan, from a state that is changed in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .computing import widened

__all__ = ["selective_state_update"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """See mamba_ssm.ops.triton.selective_state_update.selective_state_update.

    Args:
        state: [batch, heads, width, state], or without heads; is changed in place.
        x: [batch, heads, width], or without heads; so for dt and z.
        dt: the step, before bias and softplus.
        A: rates [heads, width, state], or without heads.
        B: input weights [batch, groups, state] of groups of heads, or without groups.
        C: read-outs, likewise.
        D: [heads, width], or without heads; so for dt_bias.
        z: gates y by its SiLU.
        dt_bias: of the step.
        dt_softplus: whether the step is the softplus of dt.
        state_batch_indices: which entries of state those of the batch are: int [batch].

    Returns:
        y like x.
    """
    entries = slice(None) if state_batch_indices is None else state_batch_indices.long()
    given = widened(state[entries], x, dt, A, B, C, D, z, dt_bias)
    h, frame, step, rates, b, c, skip, gate, bias = given
    if state.dim() == 3:
        h, frame, step = h.unsqueeze(1), frame.unsqueeze(1), step.unsqueeze(1)
    heads = h.shape[1]
    b, c = (each.unsqueeze(1) if each.dim() == 2 else each for each in (b, c))
    b, c = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (b, c))
    step = step if bias is None else step + bias
    step = functional.softplus(step) if dt_softplus else step
    h = torch.exp(step.unsqueeze(-1) * rates) * h + (step * frame).unsqueeze(-1) * b.unsqueeze(2)
    y = (h * c.unsqueeze(2)).sum(-1)
    y = y if skip is None else y + skip * frame
    y = y.reshape(x.shape)
    y = y if gate is None else y * functional.silu(gate)
    state[entries] = h.reshape(x.shape[0], *state.shape[1:]).to(state.dtype)
    return y.to(x.dtype)
