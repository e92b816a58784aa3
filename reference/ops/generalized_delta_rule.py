"""RWKV-7's recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .op import declare

__all__ = ["generalized_delta_rule"]


def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
) -> Sequence[Sequence[Any]]:
    """Shapes of generalized_delta_rule's outputs."""
    del query, log_decay, a, b, initial
    return value.shape, (value.shape[0], value.shape[-2], key.shape[-1], value.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """As RWKV-7 has it: what is taken away is along the direction that is read, at most all of it."""
    frames = (n["batch"], n["sequence"], n["heads"])
    direction = functional.normalize(draw(*frames, n["state"]), dim=-1)
    return {
        "query": draw(*frames, n["state"]),
        "key": draw(*frames, n["state"]),
        "value": draw(*frames, n["channels"]),
        "log_decay": -0.6 * torch.sigmoid(draw(*frames, n["state"])),
        "a": -direction,
        "b": direction * torch.sigmoid(draw(*frames, n["state"])),
        "initial": draw(n["batch"], n["heads"], n["state"], n["channels"]),
    }


@declare(
    shapes=_shapes,
    streamed=("query", "key", "value", "log_decay", "a", "b"),
    states=("initial",),
    axes=4,
    cases=(_case,),
)
def generalized_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's generalised delta rule (arXiv 2503.14456): a matrix for each head, read along a and written along b.

        r_t[h, v]    = sum_k a_t[h, k] * S_{t-1}[h, k, v]        S_0 = initial
        S_t[h, k, v] = exp(log_decay_t[h, k]) * S_{t-1}[h, k, v] + b_t[h, k] * r_t[h, v] + key_t[h, k] * value_t[h, v]
        y_t[h, v]    = sum_k query_t[h, k] * S_t[h, k, v]

    RWKV-7 passes its receptance for the query, -kk for a and kk * a for b, kk of length 1.

    Args:
        query: [batch, sequence, heads, key width], or one frame [batch, heads, key width]; so for what follows.
        key: [batch, sequence, heads, key width].
        value: [batch, sequence, heads, value width].
        log_decay: at most 0 for a stable recurrence [batch, sequence, heads, key width or 1].
        a: where the state before the frame is read [batch, sequence, heads, key width].
        b: where what was read is added [batch, sequence, heads, key width].
        initial: the state before the first frame [batch or 1, heads, key width, value width].

    Returns:
        y [batch, sequence, heads, value width] and the state after the last frame
        [batch, heads, key width, value width].
    """
    size = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
    # A product of matrices doesn't promote types.
    state = value.new_zeros(size) if initial is None else initial.type_as(value).expand(size)
    outputs = []
    for t in range(value.shape[1]):
        read = a[:, t, :, None] @ state
        added = b[:, t, ..., None] * read + key[:, t, ..., None] * value[:, t, :, None]
        state = torch.exp(log_decay[:, t, ..., None]) * state + added
        outputs.append((query[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=1), state.contiguous()
