"""The short convolution in front of a scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["causal_conv1d"]


def _shapes(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, past: Tensor | None = None
) -> Sequence[Sequence[Any]]:
    """Shapes of causal_conv1d's outputs."""
    del bias, groups, past
    return x.shape, (x.shape[0], weight.shape[-1] - 1, x.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    return {
        "x": draw(n["batch"], n["sequence"], n["channels"]),
        "weight": draw(n["channels"], 1, n["kernel"]),
        "bias": draw(n["channels"]),
        "groups": n["channels"],
        "past": draw(n["batch"], n["kernel"] - 1, n["channels"]),
    }


@declare(shapes=_shapes, streamed=("x",), states=("past",), sees=("weight", 2), cases=(_case,))
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time: output t sees frames t-K+1 to t, the last tap meets frame t.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels].
        weight: one kernel for each channel, cross-correlation [channels, 1, kernel].
        bias: [channels].
        groups: channels: a convolution within each.
        past: the frames before the first [batch or 1, kernel - 1, channels].

    Returns:
        y [batch, sequence, channels] and the last frames [batch, kernel - 1, channels].
    """
    channels, within, kernel = weight.shape
    if (groups, within) != (channels, 1):
        raise ValueError(
            f"a depthwise convolution of {channels} channels has {channels} groups and a weight "
            f"[{channels}, 1, kernel], got {groups} and {list(weight.shape)}"
        )
    length = x.shape[1]
    before = x.new_zeros(x.shape[0], kernel - 1, channels) if past is None else past.expand(x.shape[0], -1, -1)
    seen = torch.cat([before, x], dim=1)
    # As a sum of shifted frames: torch's grouped convolution of float64 takes a hundred times as long.
    y = bias.expand_as(x).clone()
    for tap in range(kernel):
        y = y + seen[:, tap : tap + length] * weight[:, 0, tap]
    return y, seen[:, length:].clone()
