"""Freeze: put in place of every part of a model that depends on no input the values that it makes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["freeze"]

M = TypeVar("M")
"""A module, by whatever contract it is known."""


def freeze(model: M) -> M:
    """The same model with its finished values: no graph holds the network that makes Hyena's filters.

    What methods marked as `input_free` make is computed in float64 and rounded once, so that it is nearer to the
    mathematics than the model's own precision would make it.

    Returns:
        A copy that shares the other parameters with `model`, which is not changed.
    """
    assert isinstance(model, nn.Module)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    frozen = copy.deepcopy(model, shared)
    for module in list(frozen.modules()):
        for name in dir(type(module)):
            if getattr(getattr(type(module), name, None), "input_free", False):
                _finish(module, name)
    return frozen


def _finish(module: nn.Module, name: str) -> None:
    """Has a method give, from buffers, what it makes now."""
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        made: Any = getattr(copy.deepcopy(module).double(), name)()
    tensors, structure = pytree.tree_flatten(made)
    if name == "forward":
        # It is all that the module is for.
        for held in (module._parameters, module._buffers, module._modules):
            held.clear()
    stem = "value" if name == "forward" else f"{name}_value"
    buffers = [f"{stem}_{index}" for index in range(len(tensors))] if len(tensors) != 1 else [stem]
    for buffer, tensor in zip(buffers, tensors, strict=True):
        module.register_buffer(buffer, tensor.to(dtype).contiguous())

    def finished() -> Any:
        values: list[Tensor] = [getattr(module, buffer) for buffer in buffers]
        return pytree.tree_unflatten(values, structure)

    object.__setattr__(module, name, finished)
