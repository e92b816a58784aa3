"""Axon's layer norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["floored_layer_norm"]


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    # Every other frame has a variance far below the floor.
    x = draw(n["batch"], n["sequence"], 2 + n["channels"])
    x[:, ::2] *= 1e-5
    return {"x": x, "weight": draw(2 + n["channels"]), "bias": draw(2 + n["channels"]), "epsilon": 1e-5}


@declare(streamed=("x",), sees=1, cases=(_case,))
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
