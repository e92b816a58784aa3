"""RWKV-4's average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["wkv"]


def _shapes(key: Tensor, *others: Any) -> Sequence[Sequence[Any]]:
    """Shapes of wkv's outputs."""
    del others
    return key.shape, *[(key.shape[0], key.shape[-1])] * 3


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    frames, state = (n["batch"], n["sequence"], n["channels"]), (n["batch"], n["channels"])
    return {
        "key": 3 * draw(*frames),
        "value": draw(*frames),
        "log_decay": -torch.exp(draw(n["channels"])),
        "bonus": draw(n["channels"]),
        "numerator": draw(*state),
        "denominator": torch.exp(draw(*state)),
        "maximum": draw(*state),
    }


@declare(
    shapes=_shapes,
    streamed=("key", "value"),
    states=("numerator", "denominator", "maximum"),
    cases=(_case,),
)
def wkv(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    numerator: Tensor | None = None,
    denominator: Tensor | None = None,
    maximum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The average of values by RWKV-4 (arXiv 2305.13048): weighed by exponentials of keys, which decay.

        a_t = exp(log_decay) * a_{t-1} + exp(key_t) * value_t        a_0 = numerator * exp(maximum)
        b_t = exp(log_decay) * b_{t-1} + exp(key_t)                  b_0 = denominator * exp(maximum)
        y_t = (a_{t-1} + exp(bonus + key_t) * value_t) / (b_{t-1} + exp(bonus + key_t))

    Sums are kept divided by the exponential of the largest exponent in them, so that keys of any size can come. Where
    the denominator is 0 nothing came before, whatever the maximum. RWKV-4's log_decay is -exp(time_decay), its bonus
    time_first.

    Args:
        key: [batch, sequence, channels], or one frame [batch, channels]; so for value.
        value: [batch, sequence, channels].
        log_decay: at most 0 [channels].
        bonus: of the current frame's key [channels].
        numerator: before the first frame [batch or 1, channels].
        denominator: likewise, at least 0 [batch or 1, channels].
        maximum: the exponent that both are divided by [batch or 1, channels].

    Returns:
        y [batch, sequence, channels], and numerator, denominator and maximum after the last frame [batch, channels].
    """
    size = (key.shape[0], key.shape[-1])
    given = (numerator, denominator, maximum)
    above, below, largest = (key.new_zeros(size) if state is None else state.expand(size) for state in given)
    largest = torch.where(below == 0, -math.inf, largest)
    outputs = []
    for t in range(key.shape[1]):
        k, v = key[:, t], value[:, t]
        top = torch.maximum(largest, bonus + k)
        past, now = torch.exp(largest - top), torch.exp(bonus + k - top)
        outputs.append((past * above + now * v) / (past * below + now))
        top = torch.maximum(largest + log_decay, k)
        past, now = torch.exp(largest + log_decay - top), torch.exp(k - top)
        above, below, largest = past * above + now * v, past * below + now, top
    return torch.stack(outputs, dim=1), above, below, largest
