"""What ops that read out some of their frames share."""

from __future__ import annotations

from torch import Tensor

__all__ = ["QUERY_BLOCK", "first_read"]

QUERY_BLOCK = 256
"""Queries whose scores are in memory at once: a long sequence has too many pairs for all."""


def first_read(frames: Tensor, c: Tensor) -> int:
    """The first frame that is read out: c are the read-outs of the last ones."""
    first = frames.shape[1] - c.shape[1]
    if first < 0:
        raise ValueError(f"there are {c.shape[1]} read-outs of {frames.shape[1]} frames; there can be one of each")
    return first
