"""Attention to everything before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import attend, split_heads
from .op import declare
from .reading import QUERY_BLOCK

__all__ = ["causal_attention"]


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    width, seen = n["heads"] * n["channels"], n["prefix"] + n["sequence"]
    return {
        "query": draw(n["batch"], n["sequence"], width),
        "key": draw(n["batch"], seen, width),
        "value": draw(n["batch"], seen, width),
        "num_heads": n["heads"],
        "epsilon": 1e-8,
    }


@declare(streamed=("query", "key", "value"), read_out="query", cases=(_case,))
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
    q, k, v = (split_heads(t, num_heads) for t in (query, key, value))
    length, seen = q.shape[2], k.shape[2]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK]
        visible = torch.ones(block.shape[2], seen, dtype=torch.bool, device=q.device).tril(seen - length + start)
        outputs.append(attend(block, k, v, visible, epsilon))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
