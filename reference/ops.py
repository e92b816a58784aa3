"""The operators that exporters can't take apart: each a torch custom op of namespace `edifice`.

An op is registered from its plain-torch definition, the mathematics. A traced graph keeps the op whole, so that a
lowering can be chosen for it later; eager code runs the definition, and gradients are those of the definition.

    B batch, T sequence, S key sequence, C channels, N state, K kernel, W attention width, H heads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

OPS = (
    "causal_attention",
    "causal_conv1d",
    "cumulative_scan",
    "diagonal_scan",
    "fft_conv",
    "floored_layer_norm",
    "linear_scan",
    "selective_scan",
)

__all__ = ["MAX_ATTENTION_EPSILON", "NAMESPACE", "OPS", *OPS]

NAMESPACE = "edifice"

MAX_ATTENTION_EPSILON = 2.0**-25
"""Below the resolution of a float32 sum that is at least 1: float32 lowerings may leave epsilon out."""


_QUERY_BLOCK = 256
"""Queries whose scores are in memory at once: a long sequence has too many pairs for all."""


def _edifice_op(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `definition` as `edifice::<its name>`; its result has the shape and dtype of its first argument."""
    op = torch.library.custom_op(f"{NAMESPACE}::{definition.__name__}", definition, mutates_args=())

    @op.register_fake
    def _(first: Tensor, *_rest: Any) -> Tensor:
        return torch.empty_like(first)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.constants = [value for value in inputs if not isinstance(value, Tensor)]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The definition is run again under autograd: one mathematics, no gradient formula to keep in step with it.
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        inputs = [next(tensors).detach() if tensor else next(constants) for tensor in ctx.is_tensor]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for index in wanted:
                inputs[index].requires_grad_()
            output = definition(*inputs)
            found = torch.autograd.grad(output, [inputs[index] for index in wanted], gradient)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for index, value in zip(wanted, found, strict=True):
            gradients[index] = value
        return tuple(gradients)

    op.register_autograd(backward, setup_context=setup_context)
    return op


@_edifice_op
def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Diagonal state-space recurrence whose step, input and read-out depend on the input (Mamba, arXiv 2312.00752).

        h_t[c, n] = exp(delta_t[c] * a[c, n]) * h_{t-1}[c, n] + b_t[n] * x_t[c]        h_0 = 0
        y_t[c]    = sum_n c_t[n] * h_t[c, n]

    The step that scales the input is the caller's: Mamba passes delta * x for x.

    Args:
        x: [batch, sequence, channels].
        delta: step of each channel [batch, sequence, channels].
        a: rates, negative for a stable model [channels or 1, state].
        b: input weights [batch, sequence, state].
        c: read-out weights [batch, sequence, state].

    Returns:
        [batch, sequence, channels].
    """
    h = x.new_zeros(x.shape[0], x.shape[2], a.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * a)
        h = decay * h + b[:, t, None, :] * x[:, t, :, None]
        outputs.append(torch.einsum("bcn,bn->bc", h, c[:, t]))
    return torch.stack(outputs, dim=1)


@_edifice_op
def linear_scan(x: Tensor, log_decay: Tensor) -> Tensor:
    """First-order linear recurrence, elementwise, whose decay depends on the input.

        h_t = exp(log_decay_t) * h_{t-1} + x_t        h_0 = 0

    The decay is given as its logarithm because float32 can't tell decays near 1 apart well enough: over thousands of
    frames the rounding of 1 - 1e-4 alone would be seen.

    Args:
        x: [batch, sequence, channels].
        log_decay: at most 0 for a stable recurrence [batch, sequence, channels or 1].

    Returns:
        [batch, sequence, channels].
    """
    h = torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(log_decay[:, t]) * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1)


@_edifice_op
def diagonal_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Diagonal state-space recurrence whose decay is constant and shared by all channels (H3, arXiv 2212.14052).

        h_t[c, n] = exp(log_decay[n]) * h_{t-1}[c, n] + b_t[n] * x_t[c]        h_0 = 0
        y_t[c]    = sum_n c_t[n] * h_t[c, n]

    Args:
        x: [batch, sequence, channels].
        log_decay: at most 0 for a stable recurrence [state].
        b: input weights [batch, sequence, state].
        c: read-out weights [batch, sequence, state].

    Returns:
        [batch, sequence, channels].
    """
    decay = torch.exp(log_decay)
    h = x.new_zeros(x.shape[0], x.shape[2], log_decay.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        h = decay * h + b[:, t, None, :] * x[:, t, :, None]
        outputs.append(torch.einsum("bcn,bn->bc", h, c[:, t]))
    return torch.stack(outputs, dim=1)


@_edifice_op
def cumulative_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, epsilon: float) -> Tensor:
    """diagonal_scan as Edifice.SSM.H3 computes it: a quotient of cumulative products, which loses what has decayed.

        p_t[n] = exp(t * log_decay[n])
        y_t[c] = sum_n c_t[n] * p_t[n] * sum_{s <= t} b_s[n] * x_s[c] / (p_s[n] + epsilon)

    Of a frame that came in when p was far below epsilon nothing is left. It is here to reproduce weights that were
    trained with it, and only for that.

    Args:
        x: [batch, sequence, channels].
        log_decay: at most 0 [state].
        b: input weights [batch, sequence, state].
        c: read-out weights [batch, sequence, state].
        epsilon: Edifice: 1e-10.

    Returns:
        [batch, sequence, channels].
    """
    length = x.shape[1]
    steps = torch.arange(1, length + 1, dtype=x.dtype, device=x.device)
    product = torch.exp(steps[:, None] * log_decay)
    key = b / (product + epsilon)
    query = c * product
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        scores = (query[:, start:stop] @ key[:, :stop].transpose(1, 2)).tril(start)
        outputs.append(scores @ x[:, :stop])
    return torch.cat(outputs, dim=1)


@_edifice_op
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


@_edifice_op
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Causal convolution over time: output t sees frames t-K+1 to t, the last tap meets frame t.

    Args:
        x: [batch, sequence, channels].
        weight: [channels, channels / groups, kernel], cross-correlation.
        bias: [channels].
        groups: channels for a depthwise convolution.

    Returns:
        [batch, sequence, channels].
    """
    padded = functional.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return functional.conv1d(padded, weight, bias, groups=groups).transpose(1, 2).contiguous()


@_edifice_op
def causal_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, epsilon: float) -> Tensor:
    """Multi-head attention, scale 1/sqrt(head width), in which the keys before the queries are visible to all.

    Query t of T sees keys 0 to S - T + t: the last T keys are the queries' own frames, the S - T before them a prefix
    (meta tokens, or a cache).

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
    if not 0 <= epsilon <= MAX_ATTENTION_EPSILON:
        raise ValueError(f"epsilon must be from 0 to {MAX_ATTENTION_EPSILON}, got {epsilon}")
    q, k, v = (t.reshape(*t.shape[:2], num_heads, -1).transpose(1, 2) for t in (query, key, value))
    length, seen = q.shape[2], k.shape[2]
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        block = q[:, :, start : start + _QUERY_BLOCK]
        scores = block @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(seen - length + start)
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outputs.append(weights / (weights.sum(-1, keepdim=True) + epsilon) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


@_edifice_op
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
    return centred * torch.rsqrt(variance + epsilon) * weight + bias
