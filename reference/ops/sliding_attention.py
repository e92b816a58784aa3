"""Attention to the last frames, which it keeps in rings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .attention import attend, split_heads
from .op import declare
from .reading import QUERY_BLOCK

__all__ = ["sliding_attention"]


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    frames, ring = (n["batch"], n["sequence"]), (n["batch"], n["heads"], n["window"], n["channels"])
    width = n["heads"] * n["channels"]
    return {
        "query": draw(*frames, width),
        "key": draw(*frames, width),
        "value": draw(*frames, width),
        "num_heads": n["heads"],
        "epsilon": 1e-8,
        "past_key": draw(*ring),
        "past_value": draw(*ring),
        # Of each entry its own, before and after its ring is full.
        "position": (draw(n["batch"]).abs() * n["window"]).long(),
    }


def _sinks(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    """With sinks."""
    sinks = (n["sinks"], n["heads"] * n["channels"])
    return _case(draw, n) | {"sink_key": draw(*sinks), "sink_value": draw(*sinks)}


@declare(
    streamed=("query", "key", "value"),
    states=("past_key", "past_value"),
    integers=("position",),
    cases=(_case, _sinks),
)
def sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    epsilon: float,
    past_key: Tensor,
    past_value: Tensor,
    position: Tensor,
    sink_key: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-head attention, scale 1/sqrt(head width), that sees the last `window` frames, and sinks that stay in sight.

    The keys and values of the last frames are a ring: that of the frame at position p (counted from 0) is in slot
    p modulo window, so that a new frame overwrites the one that goes out of sight and nothing is moved. A slot that no
    frame has filled yet is seen by nobody. Attention does not ask in which order keys stand.

    Args:
        query: [batch, sequence, width], or one frame [batch, width]; so for key and value.
        key: [batch, sequence, width].
        value: [batch, sequence, width].
        num_heads: heads that share the width.
        epsilon: added to the softmax's denominator, whose largest term is 1 (Edifice: 1e-8).
        past_key: [batch, heads, window, width / heads].
        past_value: [batch, heads, window, width / heads].
        position: frames that each entry has seen so far, int64 [batch].
        sink_key: seen by every query [sinks, width]; none if None.
        sink_value: [sinks, width].

    Returns:
        [batch, sequence, width], and the rings of keys and of values after the last frame.

    Raises:
        ValueError: epsilon is above MAX_ATTENTION_EPSILON.
    """
    (batch, length), window = query.shape[:2], past_key.shape[2]
    frames = torch.arange(window + length, device=query.device)
    # In the order of time: the ring's frames, oldest first, then the new ones.
    oldest_first = (position[:, None] + frames[:window]) % window
    order = oldest_first[:, None, :, None].expand_as(past_key)
    k, v = (
        torch.cat([past.gather(2, order), split_heads(new, num_heads)], dim=2)
        for past, new in ((past_key, key), (past_value, value))
    )
    sinks = 0 if sink_key is None else sink_key.shape[0]
    q = split_heads(query, num_heads)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        near = slice(start + 1, stop + window)
        k_seen, v_seen = k[:, :, near], v[:, :, near]
        age = torch.arange(start, stop, device=query.device)[:, None] + window - frames[near]
        filled = frames[near] >= window - position[:, None]
        visible = ((age >= 0) & (age < window))[None] & filled[:, None]
        if sink_key is not None and sink_value is not None:
            k_seen, v_seen = (
                torch.cat([split_heads(sink[None], num_heads).expand(batch, -1, -1, -1), seen], dim=2)
                for sink, seen in ((sink_key, k_seen), (sink_value, v_seen))
            )
        visible = functional.pad(visible, (sinks, 0), value=True)
        outputs.append(attend(q[:, :, start:stop], k_seen, v_seen, visible[:, None], epsilon))
    y = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
    last_first = (frames[:window] - position[:, None] - length) % window + length
    order = last_first[:, None, :, None].expand_as(past_key)
    return y, k.gather(2, order), v.gather(2, order)
