"""Edifice's conventions: names of parameters, layout of kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edifice_reference.models.config import OptionError
from edifice_reference.models.registry import Architecture, get_architecture

from ...arguments import mapping, text
from ...errors import RequestError
from .registry import Named, Source, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["from_edifice", "from_edifice_name", "reverse_axes", "to_edifice", "to_edifice_name"]

_NORM_LEAVES = {"weight": "gamma", "bias": "beta"}
_DENSE_LEAVES = {"weight": "kernel", "bias": "bias"}

_RECORDED = ("state_sequence", "output", "output_f64")
"""Names of an input and its outputs that an exporter may have recorded beside the parameters."""


class Edifice(Source):
    """See Source. Names are `layer/param`, in safetensors also `layer.param`; kernels are [in, out]."""

    name = "edifice"
    numerics = "edifice"
    leaves_out_defaults = True

    def read(self, names: Sequence[str]) -> Named | None:
        """See Source. A recorded example is left out."""
        dotted = any(name.rpartition(".")[2] in ("kernel", "gamma", "beta") for name in names)
        if any("/" in name for name in names):
            theirs = {name: name for name in names}
        elif dotted:
            theirs = {name: name.replace(".", "/", 1) for name in names}
        else:
            return None
        return Named({name: their for name, their in theirs.items() if name not in _RECORDED})

    def filed(self, theirs: str) -> str:
        """See Source."""
        return theirs.replace("/", ".")

    def titles(self, architecture: Architecture) -> tuple[str, ...]:
        """See Source."""
        return architecture.edifice_module, f"Elixir.{architecture.edifice_module}"

    def theirs(self, own: str, architecture: Architecture) -> str:
        """See Source."""
        return to_edifice_name(own, architecture)

    def own(self, theirs: str, architecture: Architecture) -> str | None:
        """See Source."""
        return from_edifice_name(theirs, architecture)

    def knows(self, theirs: str, architecture: Architecture) -> bool:
        """See Source."""
        return from_edifice_name(theirs, architecture) is not None

    def lay_out(self, tensor: Tensor, own: str) -> Tensor:
        """See Source."""
        return reverse_axes(tensor, own)


register(Edifice())


def to_edifice(parameters: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Parameters of a reference model as Edifice names them and lays them out.

    Args:
        parameters: by torch name, such as a `state_dict()`.
        architecture: its name, such as `hymba`.

    Returns:
        By `layer/param`; kernels [in, out], convolutions [kernel, 1, channels].

    Raises:
        RequestError: a parameter is no tensor or has no counterpart in Edifice, or there is no such architecture.
    """
    known = _known(architecture)
    return {
        to_edifice_name(name, known): reverse_axes(tensor, name).contiguous() for name, tensor in _tensors(parameters)
    }


def from_edifice(parameters: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Edifice's parameters as a reference model names them and lays them out, for `load_state_dict`.

    Args:
        parameters: by `layer/param`.
        architecture: its name, such as `hymba`.

    Returns:
        By torch name; Edifice's parameters of size zero (no meta tokens) are left out.

    Raises:
        RequestError: a parameter is no tensor or not one of this architecture, or there is no such architecture.
    """
    known = _known(architecture)
    result = {}
    for name, tensor in _tensors(parameters):
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


def reverse_axes(tensor: Tensor, name: str) -> Tensor:
    """Between torch's layout of a weight, [out, in] or [out, 1, kernel], and Edifice's, which is its reverse.

    The same in both directions. Tensors that are not a layer's weight have one layout.

    Args:
        tensor: in either layout.
        name: its torch name.
    """
    return tensor.permute(*reversed(range(tensor.ndim))) if name.endswith(".weight") else tensor


def _known(architecture: str) -> Architecture:
    try:
        return get_architecture(text("architecture", architecture))
    except OptionError as error:
        raise RequestError(str(error)) from error


def _tensors(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    for name, tensor in mapping("parameters", parameters, "tensors by name").items():
        if not isinstance(tensor, Tensor):
            raise RequestError(f"parameters: {name} is a {type(tensor).__name__}; give tensors")
        yield name, tensor


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
