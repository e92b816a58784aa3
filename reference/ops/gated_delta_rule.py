"""A matrix state that is corrected: of each frame what its key doesn't give already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .op import declare

__all__ = ["gated_delta_rule"]


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of gated_delta_rule's outputs."""
    del query, log_decay, beta, initial
    return value.shape, (value.shape[0], value.shape[-2], key.shape[-1], value.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """A decay for each head (Qwen3-Next)."""
    frames = (n["batch"], n["sequence"], n["heads"])
    return {
        "query": draw(*frames, n["state"]),
        "key": functional.normalize(draw(*frames, n["state"]), dim=-1),
        "value": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*frames, 1)),
        "beta": torch.sigmoid(draw(*frames)),
        "initial": draw(n["batch"], n["heads"], n["state"], n["channels"]),
    }


def _keys(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """A decay for each channel of a key (Kimi's delta attention)."""
    given = _case(draw, n)
    return given | {"log_decay": -torch.exp(draw(*given["key"].shape))}


@declare(
    shapes=_shapes,
    streamed=("query", "key", "value", "log_decay", "beta"),
    states=("initial",),
    axes=4,
    cases=(_case, _keys),
)
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule: a matrix for each head that learns, frame by frame, to give a value for its key.

        D_t[h, k, v] = exp(log_decay_t[h, k]) * S_{t-1}[h, k, v]        S_0 = initial
        u_t[h, v]    = beta_t[h] * (value_t[h, v] - sum_k key_t[h, k] * D_t[h, k, v])
        S_t[h, k, v] = D_t[h, k, v] + key_t[h, k] * u_t[h, v]
        y_t[h, v]    = sum_k query_t[h, k] * S_t[h, k, v]

    Decays are of each head for the gated DeltaNet (arXiv 2412.06464, Qwen3-Next), of each channel of a key for Kimi's
    delta attention (2510.26692), zeros for DeltaNet (2406.06484). Scaling queries and normalising keys is the caller's:
    the state stays bounded for keys of length 1 and beta from 0 to 2.

    Args:
        query: [batch, sequence, heads, key width], or one frame [batch, heads, key width]; so for what follows.
        key: [batch, sequence, heads, key width].
        value: [batch, sequence, heads, value width].
        log_decay: at most 0 for a stable recurrence [batch, sequence, heads, key width or 1].
        beta: how much of the difference is learnt [batch, sequence, heads].
        initial: the state before the first frame [batch or 1, heads, key width, value width].

    Returns:
        y [batch, sequence, heads, value width] and the state after the last frame
        [batch, heads, key width, value width].
    """
    size = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
    state = value.new_zeros(size) if initial is None else initial.expand(size)
    outputs = []
    for t in range(value.shape[1]):
        state = torch.exp(log_decay[:, t, ..., None]) * state
        known = (key[:, t, :, None] @ state).squeeze(2)
        learnt = beta[:, t, :, None] * (value[:, t] - known)
        state = state + key[:, t, ..., None] * learnt[:, :, None]
        outputs.append((query[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=1), state.contiguous()
