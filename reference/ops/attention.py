"""What attentions share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_ATTENTION_EPSILON", "attend", "split_heads"]

MAX_ATTENTION_EPSILON = 2.0**-25
"""Below the resolution of a float32 sum that is at least 1: float32 lowerings may leave epsilon out."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, W] -> [B, H, T, P]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, epsilon: float) -> Tensor:
    """[B, H, T, P], of keys and values [B, H, S, P], those of which are visible [..., T, S] -> [B, H, T, P]."""
    if not 0 <= epsilon <= MAX_ATTENTION_EPSILON:
        raise ValueError(f"epsilon must be from 0 to {MAX_ATTENTION_EPSILON}, got {epsilon}")
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / (weights.sum(-1, keepdim=True) + epsilon) @ value
