"""Attention without a softmax, as a recurrence of a matrix state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["linear_attention"]


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of linear_attention's outputs."""
    del query, log_decay, initial
    return value.shape, (value.shape[0], value.shape[-2], key.shape[-1], value.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """A decay for each head (Mamba-2, RetNet, lightning attention)."""
    frames = (n["batch"], n["sequence"], n["heads"])
    return {
        "query": draw(*frames, n["state"]),
        "key": draw(*frames, n["state"]),
        "value": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*frames, 1)),
        "initial": draw(n["batch"], n["heads"], n["state"], n["channels"]),
    }


def _keys(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """A decay for each channel of a key (GLA)."""
    given = _case(draw, n)
    return given | {"log_decay": -torch.exp(draw(*given["key"].shape))}


def _shared(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """All heads have the same queries and keys (Mamba-2 with one group)."""
    given = _case(draw, n)
    return given | {name: given[name][:, :, :1].contiguous() for name in ("query", "key")}


@declare(
    shapes=_shapes,
    streamed=("query", "key", "value", "log_decay"),
    states=("initial",),
    axes=4,
    cases=(_case, _keys, _shared),
)
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated linear attention: a matrix for each head, to which every frame adds its key times its value.

        S_t[h, k, v] = exp(log_decay_t[h, k]) * S_{t-1}[h, k, v] + key_t[h, k] * value_t[h, v]        S_0 = initial
        y_t[h, v]    = sum_k query_t[h, k] * S_t[h, k, v]

    Decays are zeros for plain linear attention, the same in every frame for RetNet (arXiv 2307.08621) and lightning
    attention (2401.04658), of each frame and head for Mamba-2 (2405.21060, which passes c, b, delta * x and delta * a),
    of each channel of a key for GLA (2312.06635). Scaling queries is the caller's.

    Args:
        query: [batch, sequence, heads, key width], or one frame [batch, heads, key width]; so for what follows. One head
            if it is the same for all.
        key: [batch, sequence, heads or 1, key width].
        value: [batch, sequence, heads, value width].
        log_decay: at most 0 for a stable recurrence [batch, sequence, heads, key width or 1].
        initial: the state before the first frame [batch or 1, heads, key width, value width].

    Returns:
        y [batch, sequence, heads, value width] and the state after the last frame [batch, heads, key width, value width].
    """
    size = (value.shape[0], value.shape[-2], key.shape[-1], value.shape[-1])
    state = value.new_zeros(size) if initial is None else initial.expand(size)
    outputs = []
    for t in range(value.shape[1]):
        state = torch.exp(log_decay[:, t, ..., None]) * state + key[:, t, ..., None] * value[:, t, :, None]
        outputs.append((query[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=1), state.contiguous()
