"""A recurrence of each channel for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["linear_scan"]


def _shapes(x: Tensor, log_decay: Tensor, initial: Tensor | None = None) -> Sequence[Sequence[Any]]:
    """Shapes of linear_scan's outputs."""
    del log_decay, initial
    return x.shape, (x.shape[0], x.shape[-1])


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """All channels share their decays."""
    frames = (n["batch"], n["sequence"])
    return {
        "x": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*frames, 1)),
        "initial": draw(n["batch"], n["channels"]),
    }


def _own(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """Every channel has decays of its own."""
    given = _case(draw, n)
    return given | {"log_decay": -torch.exp(draw(*given["x"].shape))}


@declare(shapes=_shapes, streamed=("x", "log_decay"), states=("initial",), ends_with_state=True, cases=(_case, _own))
def linear_scan(x: Tensor, log_decay: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence, elementwise, whose decay depends on the input.

        h_t = exp(log_decay_t) * h_{t-1} + x_t        h_0 = initial

    The decay is given as its logarithm because float32 can't tell decays near 1 apart well enough: over thousands of
    frames the rounding of 1 - 1e-4 alone would be seen.

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels]; so for log_decay.
        log_decay: at most 0 for a stable recurrence [batch, sequence, channels or 1].
        initial: the state before the first frame [batch or 1, channels].

    Returns:
        h at every frame [batch, sequence, channels] and at the last [batch, channels].
    """
    h = x.new_zeros(x.shape[0], x.shape[-1]) if initial is None else initial.expand(x.shape[0], -1)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(log_decay[:, t]) * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h.clone(memory_format=torch.contiguous_format)
