"""Mamba's recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .op import declare
from .reading import first_read

__all__ = ["selective_scan"]


def _shapes(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of selective_scan's outputs."""
    del delta, a, b, initial
    return (*c.shape[:-1], x.shape[-1]), (x.shape[0], c.shape[-1], x.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    frames = (n["batch"], n["sequence"])
    return {
        "x": draw(*frames, n["channels"]),
        "delta": functional.softplus(draw(*frames, n["channels"])),
        "a": -torch.exp(draw(n["channels"], n["state"])),
        "b": draw(*frames, n["state"]),
        "c": draw(*frames, n["state"]),
        "initial": draw(n["batch"], n["state"], n["channels"]),
    }


def _multiples(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """The rates of each channel are multiples of its first, as Mamba draws them."""
    slowest = 0.25 * torch.arange(1.0, n["channels"] + 1, dtype=torch.float64)[:, None]
    return _case(draw, n) | {"a": -slowest * torch.arange(1.0, n["state"] + 1, dtype=torch.float64)}


@declare(
    shapes=_shapes,
    streamed=("x", "delta", "b", "c"),
    states=("initial",),
    read_out="c",
    reads_one_or_all=True,
    cases=(_case, _multiples),
)
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
    outputs, first = [], first_read(x, c)
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, None, :] * a.T)
        h = decay * h + b[:, t, :, None] * x[:, t, None, :]
        if t >= first:
            outputs.append(torch.einsum("bnc,bn->bc", h, c[:, t - first]))
    return torch.stack(outputs, dim=1), h.contiguous()
