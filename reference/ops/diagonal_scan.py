"""H3's recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare
from .reading import first_read

__all__ = ["diagonal_scan"]


def _shapes(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of diagonal_scan's outputs: every group reads out all channels."""
    del b, initial
    return (*c.shape[:-1], x.shape[-1]), (x.shape[0], *log_decay.shape, x.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    frames, each = (n["batch"], n["sequence"]), (n["groups"], n["state"])
    return {
        "x": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*each)),
        "b": draw(*frames, *each),
        "c": draw(*frames, *each),
        "initial": draw(n["batch"], *each, n["channels"]),
    }


@declare(shapes=_shapes, streamed=("x", "b", "c"), states=("initial",), read_out="c", cases=(_case,))
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
    outputs, first = [], first_read(x, c)
    for t in range(x.shape[1]):
        h = decay * h + b[:, t, :, :, None] * x[:, t, None, None, :]
        if t >= first:
            outputs.append(torch.einsum("bgnc,bgn->bgc", h, c[:, t - first]))
    return torch.stack(outputs, dim=1), h.contiguous()
