"""Overflow: whether float32 can't hold what a model computes on its way, which no rounding explains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edifice_reference.models.layers import LayerNorm

from .reference import Reference
from .report import Given

__all__ = ["overflows"]


def overflows(reference: Reference, graph: str, given: Given) -> bool:
    """Whether what a layer gives, or the squares that a layer norm adds up, are beyond float32.

    Args:
        reference: what computes them in float64.
        graph: what it is asked for, see manifest.GRAPHS.
        given: what for.
    """
    largest = torch.zeros((), dtype=torch.float64)

    def look(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        squares = [inputs[0].square().sum(-1)] if isinstance(module, (LayerNorm, nn.LayerNorm)) else []
        for value in (*squares, output):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                largest = torch.maximum(largest, value.abs().max())

    reference.run(graph, given, look)
    return not bool(largest <= torch.finfo(torch.float32).max)
