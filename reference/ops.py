"""The operators that exporters can't take apart: each a torch custom op of namespace `edifice`.

An op is registered from its plain-torch definition, the mathematics. A traced graph keeps the op whole, so that a
lowering can be chosen for it later; eager code runs the definition, and gradients are those of the definition.

Ops with a memory take what came before and give what comes after: a sequence computed in pieces, each from the state
that the last one left, is the sequence computed at once; without a state they start from zeros. In place of a sequence
they also take one frame, without the sequence axis, which is then missing in their output too.

Read-outs and queries may be fewer than the frames: they are then those of the last frames, and so is the output.

    B batch, T sequence, S key sequence, C channels, N state, K kernel, W attention width, H heads, P width of a head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .custom_op import NAMESPACE, edifice_op

OPS = (
    "causal_attention",
    "causal_conv1d",
    "cumulative_scan",
    "diagonal_scan",
    "fft_conv",
    "floored_layer_norm",
    "linear_scan",
    "selective_scan",
    "sliding_attention",
)

__all__ = ["MAX_ATTENTION_EPSILON", "NAMESPACE", "OPS", *OPS]

MAX_ATTENTION_EPSILON = 2.0**-25
"""Below the resolution of a float32 sum that is at least 1: float32 lowerings may leave epsilon out."""


_QUERY_BLOCK = 256
"""Queries whose scores are in memory at once: a long sequence has too many pairs for all."""


def _read_at(frames: Tensor, c: Tensor) -> int:
    """The first frame that is read out: c are the read-outs of the last ones."""
    first = frames.shape[1] - c.shape[1]
    if first < 0:
        raise ValueError(f"there are {c.shape[1]} read-outs of {frames.shape[1]} frames; there can be one of each")
    return first


def _selective(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of selective_scan's outputs."""
    del delta, a, b, initial
    return (*c.shape[:-1], x.shape[-1]), (x.shape[0], c.shape[-1], x.shape[-1])


@edifice_op(_selective, streamed=("x", "delta", "b", "c"))
def selective_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal state-space recurrence whose step, input and read-out depend on the input (Mamba, arXiv 2312.00752).

        h_t[n, c] = exp(delta_t[c] * a[c, n]) * h_{t-1}[n, c] + b_t[n] * x_t[c]        h_0 = initial
        y_t[c]    = sum_n c_t[n] * h_t[n, c]

    The step that scales the input is the caller's: Mamba passes delta * x for x.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels]; so for delta, b and c.
        delta: step of each channel [batch, sequence, channels].
        a: rates, negative for a stable model [channels or 1, state].
        b: input weights [batch, sequence, state].
        c: read-out weights, of all frames or the last ones [batch, queries, state].
        initial: the state before the first frame [batch or 1, state, channels].

    Returns:
        y [batch, queries, channels] and the state after the last frame [batch, state, channels].
    """
    h = x.new_zeros(x.shape[0], c.shape[-1], x.shape[-1]) if initial is None else initial.expand(x.shape[0], -1, -1)
    outputs, first = [], _read_at(x, c)
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, None, :] * a.T)
        h = decay * h + b[:, t, :, None] * x[:, t, None, :]
        if t >= first:
            outputs.append(torch.einsum("bnc,bn->bc", h, c[:, t - first]))
    return torch.stack(outputs, dim=1), h.contiguous()


def _linear(x: Tensor, log_decay: Tensor, initial: Tensor | None = None) -> Sequence[Sequence[Any]]:
    """Shapes of linear_scan's outputs."""
    del log_decay, initial
    return x.shape, (x.shape[0], x.shape[-1])


@edifice_op(_linear, streamed=("x", "log_decay"))
def linear_scan(x: Tensor, log_decay: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence, elementwise, whose decay depends on the input.

        h_t = exp(log_decay_t) * h_{t-1} + x_t        h_0 = initial

    The decay is given as its logarithm because float32 can't tell decays near 1 apart well enough: over thousands of
    frames the rounding of 1 - 1e-4 alone would be seen.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels]; so for log_decay.
        log_decay: at most 0 for a stable recurrence [batch, sequence, channels or 1].
        initial: the state before the first frame [batch or 1, channels].

    Returns:
        h at every frame [batch, sequence, channels] and at the last [batch, channels].
    """
    h = x.new_zeros(x.shape[0], x.shape[-1]) if initial is None else initial.expand(x.shape[0], -1)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(log_decay[:, t]) * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h.clone(memory_format=torch.contiguous_format)


def _diagonal(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of diagonal_scan's outputs: every group reads out all channels."""
    del b, initial
    return (*c.shape[:-1], x.shape[-1]), (x.shape[0], *log_decay.shape, x.shape[-1])


@edifice_op(_diagonal, streamed=("x", "b", "c"))
def diagonal_scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal state-space recurrences whose decay is constant and shared by all channels (H3, arXiv 2212.14052).

        h_t[g, n, c] = exp(log_decay[g, n]) * h_{t-1}[g, n, c] + b_t[g, n] * x_t[c]        h_0 = initial
        y_t[g, c]    = sum_n c_t[g, n] * h_t[g, n, c]

    Args:
        x: the input of all groups [batch, sequence, channels], or one frame [batch, channels]; so for b and c.
        log_decay: at most 0 for a stable recurrence [groups, state].
        b: input weights [batch, sequence, groups, state].
        c: read-out weights, of all frames or the last ones [batch, queries, groups, state].
        initial: the state before the first frame [batch or 1, groups, state, channels].

    Returns:
        y [batch, queries, groups, channels] and the state after the last frame [batch, groups, state, channels].
    """
    decay = torch.exp(log_decay)[..., None]
    size = (x.shape[0], *log_decay.shape, x.shape[-1])
    h = x.new_zeros(size) if initial is None else initial.expand(size)
    outputs, first = [], _read_at(x, c)
    for t in range(x.shape[1]):
        h = decay * h + b[:, t, :, :, None] * x[:, t, None, None, :]
        if t >= first:
            outputs.append(torch.einsum("bgnc,bgn->bgc", h, c[:, t - first]))
    return torch.stack(outputs, dim=1), h.contiguous()


def _cumulative(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, epsilon: float) -> Sequence[Sequence[Any]]:
    """Shape of cumulative_scan's output."""
    del log_decay, b, epsilon
    return ((*c.shape[:-1], x.shape[-1]),)


@edifice_op(_cumulative)
def cumulative_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, epsilon: float) -> Tensor:
    """diagonal_scan as Edifice.SSM.H3 computes it: a quotient of cumulative products, which loses what has decayed.

        p_t[g, n] = exp(t * log_decay[g, n])
        y_t[g, c] = sum_n c_t[g, n] * p_t[g, n] * sum_{s <= t} b_s[g, n] * x_s[c] / (p_s[g, n] + epsilon)

    Of a frame that came in when p was far below epsilon nothing is left. It is here to reproduce weights that were
    trained with it, and only for that. It needs its whole window: there is no state that would stand for the past.

    Args:
        x: [batch, sequence, channels].
        log_decay: at most 0 [groups, state].
        b: input weights [batch, sequence, groups, state].
        c: read-out weights, of all frames or the last ones [batch, queries, groups, state].
        epsilon: Edifice: 1e-10.

    Returns:
        [batch, queries, groups, channels].
    """
    length, first = x.shape[1], _read_at(x, c)
    steps = torch.arange(1, length + 1, dtype=x.dtype, device=x.device)
    product = torch.exp(steps[:, None, None] * log_decay)
    key = (b / (product + epsilon)).transpose(1, 2)
    query = (c * product[first:]).transpose(1, 2)
    outputs = []
    for start in range(first, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        scores = (query[:, :, start - first : stop - first] @ key[:, :, :stop].transpose(2, 3)).tril(start)
        outputs.append(scores @ x[:, None, :stop])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


@edifice_op()
def fft_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution with a kernel as long as the window, through the frequency domain (Hyena, arXiv 2302.10866).

        y_t[c] = sum_{s <= t} kernel[t - s, c] * x_s[c]

    Args:
        x: [batch, sequence, channels]; sequence at most window.
        kernel: one tap for each frame of the past, the current frame's first [window, channels].

    Returns:
        [batch, sequence, channels].

    Raises:
        ValueError: the sequence is longer than the kernel.
    """
    length, window = x.shape[1], kernel.shape[0]
    if length > window:
        raise ValueError(f"a sequence of {length} frames is longer than the kernel, which ends at {window}")
    size = 2 * length
    spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(kernel[:length], size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :length].contiguous()


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, past: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of causal_conv1d's outputs."""
    del bias, groups, past
    return x.shape, (x.shape[0], weight.shape[-1] - 1, x.shape[-1])


@edifice_op(_convolved, streamed=("x",))
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time: output t sees frames t-K+1 to t, the last tap meets frame t.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels].
        weight: one kernel for each channel, cross-correlation [channels, 1, kernel].
        bias: [channels].
        groups: channels: a convolution within each.
        past: the frames before the first [batch or 1, kernel - 1, channels].

    Returns:
        y [batch, sequence, channels] and the last frames [batch, kernel - 1, channels].
    """
    channels, within, kernel = weight.shape
    if (groups, within) != (channels, 1):
        raise ValueError(
            f"a depthwise convolution of {channels} channels has {channels} groups and a weight "
            f"[{channels}, 1, kernel], got {groups} and {list(weight.shape)}"
        )
    length = x.shape[1]
    before = x.new_zeros(x.shape[0], kernel - 1, channels) if past is None else past.expand(x.shape[0], -1, -1)
    seen = torch.cat([before, x], dim=1)
    # As a sum of shifted frames: torch's grouped convolution of float64 takes a hundred times as long.
    y = bias.expand_as(x).clone()
    for tap in range(kernel):
        y = y + seen[:, tap : tap + length] * weight[:, 0, tap]
    return y, seen[:, length:].clone()


@edifice_op()
def causal_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, epsilon: float) -> Tensor:
    """Multi-head attention, scale 1/sqrt(head width), in which the keys before the queries are visible to all.

    Query t of T sees keys 0 to S - T + t: the last T keys are the queries' own frames, the S - T before them a prefix,
    such as meta tokens.

    Args:
        query: [batch, sequence, width].
        key: [batch, prefix + sequence, width].
        value: [batch, prefix + sequence, width].
        num_heads: heads that share the width.
        epsilon: added to the softmax's denominator, whose largest term is 1 (Edifice: 1e-8).

    Returns:
        [batch, sequence, width].

    Raises:
        ValueError: epsilon is above MAX_ATTENTION_EPSILON.
    """
    q, k, v = (_split_heads(t, num_heads) for t in (query, key, value))
    length, seen = q.shape[2], k.shape[2]
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        block = q[:, :, start : start + _QUERY_BLOCK]
        visible = torch.ones(block.shape[2], seen, dtype=torch.bool, device=q.device).tril(seen - length + start)
        outputs.append(_attend(block, k, v, visible, epsilon))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def _ringed(query: Tensor, *inputs: Any) -> Sequence[Sequence[Any]]:
    """Shapes of what attention with rings gives: that of the query, and those of the rings."""
    past_key = inputs[4]
    return query.shape, past_key.shape, past_key.shape


@edifice_op(_ringed, streamed=("query", "key", "value"))
def sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    epsilon: float,
    past_key: Tensor,
    past_value: Tensor,
    position: Tensor,
    sink_key: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-head attention, scale 1/sqrt(head width), that sees the last `window` frames, and sinks that stay in sight.

    The keys and values of the last frames are a ring: that of the frame at position p (counted from 0) is in slot
    p modulo window, so that a new frame overwrites the one that goes out of sight and nothing is moved. A slot that no
    frame has filled yet is seen by nobody. Attention does not ask in which order keys stand.

    Args:
        query: [batch, sequence, width], or one frame [batch, width]; so for key and value.
        key: [batch, sequence, width].
        value: [batch, sequence, width].
        num_heads: heads that share the width.
        epsilon: added to the softmax's denominator, whose largest term is 1 (Edifice: 1e-8).
        past_key: [batch, heads, window, width / heads].
        past_value: [batch, heads, window, width / heads].
        position: frames that each entry has seen so far, int64 [batch].
        sink_key: seen by every query [sinks, width]; none if None.
        sink_value: [sinks, width].

    Returns:
        [batch, sequence, width], and the rings of keys and of values after the last frame.

    Raises:
        ValueError: epsilon is above MAX_ATTENTION_EPSILON.
    """
    (batch, length), window = query.shape[:2], past_key.shape[2]
    frames = torch.arange(window + length, device=query.device)
    # In the order of time: the ring's frames, oldest first, then the new ones.
    oldest_first = (position[:, None] + frames[:window]) % window
    order = oldest_first[:, None, :, None].expand_as(past_key)
    k, v = (
        torch.cat([past.gather(2, order), _split_heads(new, num_heads)], dim=2)
        for past, new in ((past_key, key), (past_value, value))
    )
    sinks = 0 if sink_key is None else sink_key.shape[0]
    q = _split_heads(query, num_heads)
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        near = slice(start + 1, stop + window)
        k_seen, v_seen = k[:, :, near], v[:, :, near]
        age = torch.arange(start, stop, device=query.device)[:, None] + window - frames[near]
        filled = frames[near] >= window - position[:, None]
        visible = ((age >= 0) & (age < window))[None] & filled[:, None]
        if sink_key is not None and sink_value is not None:
            k_seen, v_seen = (
                torch.cat([_split_heads(sink[None], num_heads).expand(batch, -1, -1, -1), seen], dim=2)
                for sink, seen in ((sink_key, k_seen), (sink_value, v_seen))
            )
        visible = functional.pad(visible, (sinks, 0), value=True)
        outputs.append(_attend(q[:, :, start:stop], k_seen, v_seen, visible[:, None], epsilon))
    y = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
    last_first = (frames[:window] - position[:, None] - length) % window + length
    order = last_first[:, None, :, None].expand_as(past_key)
    return y, k.gather(2, order), v.gather(2, order)


@edifice_op()
def floored_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer norm over the last axis in which a biased variance below epsilon counts as zero (Axon's layer norm).

    Args:
        x: [..., channels].
        weight: [channels].
        bias: [channels].
        epsilon: added to the variance, and the variance's floor.

    Returns:
        [..., channels].
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    variance = torch.where(variance >= epsilon, variance, 0)
    return (centred * torch.rsqrt(variance + epsilon) * weight + bias).contiguous()


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, W] -> [B, H, T, P]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, epsilon: float) -> Tensor:
    """[B, H, T, P], of keys and values [B, H, S, P], those of which are visible [..., T, S] -> [B, H, T, P]."""
    if not 0 <= epsilon <= MAX_ATTENTION_EPSILON:
        raise ValueError(f"epsilon must be from 0 to {MAX_ATTENTION_EPSILON}, got {epsilon}")
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / (weights.sum(-1, keepdim=True) + epsilon) @ value
