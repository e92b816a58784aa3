"""Freeze: put in place of every part of a model that depends on no input the values that it makes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["freeze"]


def freeze(model: nn.Module) -> nn.Module:
    """The same model with its finished values: no graph holds the network that makes Hyena's filters.

    A module whose forward takes nothing depends on no input. Its values are computed in float64 and rounded once, so
    that they are nearer to the mathematics than the model's own precision would make them.

    Returns:
        A copy that shares the other parameters with `model`, which is not changed.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    frozen = copy.deepcopy(model, shared)
    for path, module in list(frozen.named_modules()):
        if path and _takes_nothing(module):
            parent, _, name = path.rpartition(".")
            setattr(frozen.get_submodule(parent), name, _Finished(module))
    return frozen


class _Finished(nn.Module):
    """What a module made: `value`, or `value_0`, `value_1`, ... of several."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        dtype = next(module.parameters()).dtype
        with torch.no_grad():
            made: Tensor | Sequence[Tensor] = copy.deepcopy(module).double()()
        self.names = ["value"] if isinstance(made, Tensor) else [f"value_{index}" for index in range(len(made))]
        for name, tensor in zip(self.names, [made] if isinstance(made, Tensor) else made, strict=True):
            self.register_buffer(name, tensor.to(dtype).contiguous())

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        tensors = tuple(getattr(self, name) for name in self.names)
        return tensors[0] if self.names == ["value"] else tensors


def _takes_nothing(module: nn.Module) -> bool:
    return list(inspect.signature(type(module).forward).parameters) == ["self"]
