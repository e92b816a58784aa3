"""H3's recurrence as Edifice computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare
from .reading import QUERY_BLOCK, first_read

__all__ = ["cumulative_scan"]


def _shapes(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, epsilon: float) -> Sequence[Sequence[Any]]:
    """Shape of cumulative_scan's output."""
    del log_decay, b, epsilon
    return ((*c.shape[:-1], x.shape[-1]),)


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    frames, each = (n["batch"], n["sequence"]), (n["groups"], n["state"])
    return {
        "x": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*each)),
        "b": draw(*frames, *each),
        "c": draw(*frames, *each),
        "epsilon": 1e-10,
    }


@declare(shapes=_shapes, streamed=("x", "b", "c"), read_out="c", cases=(_case,))
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
    length, first = x.shape[1], first_read(x, c)
    steps = torch.arange(1, length + 1, dtype=x.dtype, device=x.device)
    product = torch.exp(steps[:, None, None] * log_decay)
    key = (b / (product + epsilon)).transpose(1, 2)
    query = (c * product[first:]).transpose(1, 2)
    outputs = []
    for start in range(first, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        scores = (query[:, :, start - first : stop - first] @ key[:, :, :stop].transpose(2, 3)).tril(start)
        outputs.append(scores @ x[:, None, :stop])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
