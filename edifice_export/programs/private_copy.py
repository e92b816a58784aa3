"""A private copy of somebody's module: what is exported and compared with, so that theirs is never touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ..errors import RequestError

__all__ = ["Float64", "in_float64", "private_copy", "unwrapped"]

_HALVES = (torch.float16, torch.bfloat16)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile or a parallel wrapper was put around."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def private_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in inference mode, that computes in float32 where the module is in half precision.

    Parameters share memory with the module's, where they are as they should be; parametrizations (weight norm, say) are
    replaced by the values that they make now. Tied parameters stay tied.

    Raises:
        RequestError: the module can't be copied, or has parameters that have no values yet.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise RequestError(
            f"{type(module).__name__}: is a TorchScript module, which can't be traced; give the original"
        )
    if any(isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)) for value in module.parameters()):
        raise RequestError(f"{type(module).__name__} has lazy parameters without values; run it once before")
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise RequestError(
            f"{type(module).__name__} is on torch's meta device, without numbers; load its weights before"
        )
    shared: dict[int, Any] = {
        id(value): nn.Parameter(value.detach(), requires_grad=False) for value in module.parameters()
    }
    # What was computed from parameters and kept, as by the older weight norm, copy.deepcopy refuses.
    shared |= {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        mine = copy.deepcopy(module, shared)
    except (TypeError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{type(module).__name__} can't be copied ({error}); what it holds must be fit for copy.deepcopy"
        ) from error
    mine.eval()  # what parametrizations make in training is another thing
    for part in list(mine.modules()):
        _make_plain(part)
    # Each tensor once, so that what is tied stays so.
    known: dict[int, torch.Tensor] = {}
    mine._apply(lambda value: known.setdefault(id(value), _plain_tensor(value)))  # type: ignore[no-untyped-call]
    return mine


def _plain_tensor(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32 if value.dtype in _HALVES else value.dtype)


def _make_plain(module: nn.Module) -> None:
    """Puts values in place of what makes them at every call."""
    if parametrize.is_parametrized(module):
        made = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        # By hand: torch's own removal takes the property from the class, which the user's module shares.
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


def in_float64(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are float64; run it under Float64, in case its code names another type."""
    return copy.deepcopy(module).double()


class Float64(TorchFunctionMode):
    """Has code compute in float64 that asks for less: `.float()`, `dtype=torch.float32`, the default type."""

    def __enter__(self) -> Float64:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_LESS:
            func = torch.Tensor.double
        return func(*map(_exact, args), **{key: _exact(value) for key, value in (kwargs or {}).items()})


_TO_LESS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def _exact(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
