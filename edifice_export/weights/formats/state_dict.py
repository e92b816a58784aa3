"""A state_dict: names and tensors, as a model in memory gives it or a file of torch's holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .error import FormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_state_dict"]

_BELOW = ("state_dict", "model_state_dict", "model")
"""Where a checkpoint of a training run has the model's: Lightning, torch's own tutorials, many a script."""


def read_state_dict(found: object) -> dict[str, Tensor]:
    """The tensors of a state_dict, or of a checkpoint that holds one below one of _BELOW; on the CPU, without copies.

    Raises:
        FormatError: it is something else, holds several of them, or something besides ordinary tensors.
    """
    if not isinstance(found, Mapping):
        raise FormatError(f"holds a {type(found).__name__}, and should hold a model's state_dict()")
    below = [name for name in _BELOW if isinstance(found.get(name), Mapping)]
    if len(below) > 1:
        raise FormatError(f"holds tensors below {' and '.join(below)}; save one of them alone")
    tensors = found[below[0]] if below else found
    return {_name(name): _plain(name, tensor) for name, tensor in tensors.items()}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise FormatError(f"holds something under {name!r:.80}, and names are text; give a model's state_dict()")
    return name


def _plain(name: str, tensor: Any) -> Tensor:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise FormatError(f"{name:.100} is a {type(tensor).__name__} and no tensor; give a model's state_dict() alone")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        raise FormatError(f"{name:.100} is sparse, quantized, nested or without data; give an ordinary tensor")
    plain: Tensor = tensor.detach().cpu()
    return plain
