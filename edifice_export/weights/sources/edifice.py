"""Edifice's conventions: names of parameters, layout of kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edifice_reference.models.registry import ARCHITECTURES, Architecture, get_architecture

from ...errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "from_edifice",
    "from_edifice_name",
    "has_edifice_names",
    "recognise",
    "reverse_axes",
    "to_edifice",
    "to_edifice_name",
]

_NORM_LEAVES = {"weight": "gamma", "bias": "beta"}
_DENSE_LEAVES = {"weight": "kernel", "bias": "bias"}


def to_edifice(parameters: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Parameters of a reference model as Edifice names them and lays them out.

    Args:
        parameters: by torch name, such as a `state_dict()`.
        architecture: its name, such as `hymba`.

    Returns:
        By `layer/param`; kernels [in, out], convolutions [kernel, 1, channels].

    Raises:
        RequestError: a parameter has no counterpart in Edifice.
        OptionError: there is no such architecture.
    """
    known = get_architecture(architecture)
    return {
        to_edifice_name(name, known): reverse_axes(tensor, name).contiguous() for name, tensor in parameters.items()
    }


def from_edifice(parameters: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Edifice's parameters as a reference model names them and lays them out, for `load_state_dict`.

    Args:
        parameters: by `layer/param`.
        architecture: its name, such as `hymba`.

    Returns:
        By torch name; Edifice's parameters of size zero (no meta tokens) are left out.

    Raises:
        RequestError: a parameter is not one of this architecture.
        OptionError: there is no such architecture.
    """
    known = get_architecture(architecture)
    result = {}
    for name, tensor in parameters.items():
        own = from_edifice_name(name, known)
        if own is None:
            raise RequestError(f"{name} is no parameter of Edifice's {architecture}; check the architecture")
        if tensor.numel():
            result[own] = reverse_axes(tensor, own).contiguous()
    return result


def to_edifice_name(name: str, architecture: Architecture) -> str:
    """Edifice's `layer/param` of a parameter, by its torch name.

    Raises:
        RequestError: Edifice has none.
    """
    module, _, leaf = name.rpartition(".")
    for own, edifice in architecture.edifice_names.items():
        whole = re.fullmatch(_regex(own, 0), name)
        if whole:
            return _fill(edifice, whole, 1)
        layer = re.fullmatch(_regex(own, 0), module)
        if layer and leaf in ("weight", "bias"):
            return f"{_fill(edifice, layer, 1)}/{_leaves(own)[leaf]}"
    raise RequestError(
        f"{name} of {architecture.name} has no counterpart in Edifice, so these weights can't be Edifice's"
    )


def from_edifice_name(name: str, architecture: Architecture) -> str | None:
    """The torch name of Edifice's `layer/param`; None if the architecture has no such parameter for any options."""
    layer, _, leaf = name.rpartition("/")
    for own, edifice in architecture.edifice_names.items():
        pattern = _regex(edifice, 1)
        if "/" in edifice:
            found = re.fullmatch(pattern, name)
            if found:
                return _fill(own, found, -1)
            continue
        found = re.fullmatch(pattern, layer)
        leaves = {param: own_leaf for own_leaf, param in _leaves(own).items()}
        if found and leaf in leaves:
            return f"{_fill(own, found, -1)}.{leaves[leaf]}"
    return None


def recognise(names: Iterable[str]) -> Architecture | None:
    """The one architecture that knows the most of these names, torch's or Edifice's; None if none or several do."""
    names = list(names)
    known = {
        architecture.name: sum(_is_name_of(name, architecture) for name in names)
        for architecture in ARCHITECTURES.values()
    }
    most = max(known.values(), default=0)
    best = [name for name, count in known.items() if count == most]
    return ARCHITECTURES[best[0]] if most and len(best) == 1 else None


def has_edifice_names(names: Iterable[str]) -> bool:
    """Whether parameters are named as Edifice does, `layer/param`."""
    return any("/" in name for name in names)


def reverse_axes(tensor: Tensor, name: str) -> Tensor:
    """Between torch's layout of a weight, [out, in] or [out, 1, kernel], and Edifice's, which is its reverse.

    The same in both directions. Tensors that are not a layer's weight have one layout.

    Args:
        tensor: in either layout.
        name: its torch name.
    """
    return tensor.permute(*reversed(range(tensor.ndim))) if name.endswith(".weight") else tensor


def _is_name_of(name: str, architecture: Architecture) -> bool:
    if "/" in name:
        return from_edifice_name(name, architecture) is not None
    try:
        to_edifice_name(name, architecture)
    except RequestError:
        return False
    return True


def _leaves(own: str) -> dict[str, str]:
    return _NORM_LEAVES if own.endswith("norm") else _DENSE_LEAVES


@functools.cache
def _regex(pattern: str, first: int) -> re.Pattern[str]:
    """Of a pattern in which {} is the block, counted from `first`, and [] a part of it, counted from 0."""
    counts = {r"\{\}": "0|[1-9][0-9]{0,5}" if first == 0 else "[1-9][0-9]{0,5}", r"\[\]": "0|[1-9][0-9]{0,5}"}
    text = re.escape(pattern)
    for place, (mark, count) in zip(("block", "part"), counts.items(), strict=True):
        text = text.replace(mark, f"(?P<{place}>{count})", 1).replace(mark, f"(?P={place})")
    return re.compile(text)


def _fill(pattern: str, found: re.Match[str], shift: int) -> str:
    groups = found.groupdict()
    block = str(int(groups["block"]) + shift) if "block" in groups else ""
    return pattern.replace("{}", block).replace("[]", groups.get("part", ""))
