"""Overflow: whether float32 can't hold what a model computes on its way, which no rounding explains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

__all__ = ["overflows"]


def overflows(model: Any, graph: str, sequence: np.ndarray) -> bool:
    """Whether what a layer gives for a sequence, or the squares that a layer norm adds up, are beyond float32.

    Args:
        model: the reference, in any precision.
        graph: what it is asked for, see manifest.GRAPHS.
        sequence: [batch, sequence, embed_dim].
    """
    import torch

    from edifice_reference.models.layers import LayerNorm

    largest = torch.zeros((), dtype=torch.float64)

    def look(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        squares = [inputs[0].square().sum(-1)] if isinstance(module, LayerNorm) else []
        for value in (*squares, output):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                largest = torch.maximum(largest, value.abs().max())

    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        module.register_forward_hook(look)
    with torch.no_grad():
        (exact if graph == "window" else exact.forward_stream)(torch.tensor(sequence).double())
    return not bool(largest <= torch.finfo(torch.float32).max)
