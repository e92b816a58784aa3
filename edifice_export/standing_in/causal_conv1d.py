"""causal_conv1d: the short convolution, over a sequence or from a state that is changed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from edifice_reference import ops

from .computing import activated, refuse, widened

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "short_convolution"]


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ops.causal_conv1d without an activation, whose bias may be missing.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels].
        weight: [channels, kernel].
        bias: [channels].
        past: the frames before the first [batch or 1, kernel - 1, channels].

    Returns:
        y [batch, sequence, channels] and the last frames [batch, kernel - 1, channels].
    """
    channels = weight.shape[0]
    bias = weight.new_zeros(channels) if bias is None else bias
    return ops.causal_conv1d(x, weight.unsqueeze(1), bias, channels, past)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See causal_conv1d.causal_conv1d_fn.

    Args:
        x: [batch, channels, sequence].
        weight: [channels, kernel].
        bias: [channels].
        seq_idx: not covered.
        initial_states: the frames before the first [batch, channels, kernel - 1].
        return_final_states: whether to give the last frames, too.
        final_states_out: [batch, channels, kernel - 1], where they are then written.
        activation: None, silu or swish.

    Returns:
        y like x; and the last frames [batch, channels, kernel - 1].

    Raises:
        RequestError: seq_idx, or another activation.
    """
    refuse("causal_conv1d_fn", seq_idx=seq_idx)
    frames, taps, shift, past = widened(x, weight, bias, initial_states)
    before = None if past is None else past.transpose(1, 2)
    y, last = short_convolution(frames.transpose(1, 2), taps, shift, before)
    out = activated(y, activation).transpose(1, 2).to(x.dtype)
    if not return_final_states:
        return out
    final = last.transpose(1, 2).to(x.dtype)
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """See causal_conv1d.causal_conv1d_update.

    Args:
        x: [batch, channels], or [batch, channels, sequence].
        conv_state: the frames before, the latest last [batch, channels, kernel - 1 or more]; is changed in place.
        weight: [channels, kernel].
        bias: [channels].
        activation: None, silu or swish.
        cache_seqlens: where conv_state is a ring, how many frames each entry has seen: int [batch].
        conv_state_indices: which entries of conv_state those of the batch are: int [batch].

    Returns:
        y like x.

    Raises:
        RequestError: another activation.
    """
    frames = x.unsqueeze(-1) if x.dim() == 2 else x
    entries = slice(None) if conv_state_indices is None else conv_state_indices.long()
    state = conv_state[entries]
    length, kept = frames.shape[-1], weight.shape[-1] - 1
    if cache_seqlens is None:
        seen = state[..., state.shape[-1] - kept :]
        after = torch.cat([state, frames.to(state.dtype)], dim=-1)[..., length:]
    else:
        seen = state.gather(-1, _places(cache_seqlens - kept, kept, state))
        after = state.scatter(-1, _places(cache_seqlens, length, state), frames.to(state.dtype))
    given, taps, shift, past = widened(frames, weight, bias, seen)
    y, _ = short_convolution(given.transpose(1, 2), taps, shift, past.transpose(1, 2))
    conv_state[entries] = after
    out = activated(y, activation).transpose(1, 2).to(x.dtype)
    return out.squeeze(-1) if x.dim() == 2 else out


def _places(first: Tensor, count: int, ring: Tensor) -> Tensor:
    """Where in a ring [batch, channels, length] so many frames lie: int64 [batch, channels, count]."""
    places = (first.long()[:, None] + torch.arange(count, device=ring.device)) % ring.shape[-1]
    return places[:, None].expand(-1, ring.shape[1], -1)
