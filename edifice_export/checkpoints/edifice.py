"""Edifice's conventions: names of parameters, layout of kernels, names of options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.registry import Architecture

from ..errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["has_edifice_names", "is_known", "parse_options", "reverse_axes", "to_edifice_names"]

_NORM_LEAVES = {"weight": "gamma", "bias": "beta"}
_DENSE_LEAVES = {"weight": "kernel", "bias": "bias"}


def has_edifice_names(names: Iterable[str]) -> bool:
    """Whether parameters are named as Edifice does, `layer/param`."""
    return any("/" in name for name in names)


def is_known(name: str, architecture: Architecture) -> bool:
    """Whether an architecture has an Edifice parameter of that name for some options."""
    patterns = (re.escape(known).replace(r"\{\}", r"\d+") for known in architecture.edifice_names.values())
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def to_edifice_names(model: nn.Module, architecture: Architecture) -> dict[str, str]:
    """Edifice's `layer/param` for every parameter of a reference model, by its torch name."""
    return {name: _edifice_name(name, model, architecture.edifice_names) for name, _ in model.named_parameters()}


def reverse_axes(tensor: Tensor, name: str) -> Tensor:
    """Between torch's layout of a weight, [out, in] or [out, 1, kernel], and Edifice's, which is its reverse.

    The same in both directions. Tensors that are not a layer's weight have one layout.
    """
    return tensor.permute(*reversed(range(tensor.ndim))) if name.endswith(".weight") else tensor


def parse_options(path: Path, text: str) -> dict[str, Any]:
    """The options of a build, from the JSON that the file keeps them in.

    `seq_len`, which Edifice takes in place of window_size, is renamed. Options without a value are left out.

    Raises:
        RequestError: this is not a JSON object.
    """
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--weights {path}: its metadata `options` is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise RequestError(f"--weights {path}: metadata `options` is not a JSON object but a {type(options).__name__}")
    options = {name: value for name, value in options.items() if value is not None}
    if "seq_len" in options:
        options["window_size"] = options.pop("seq_len")
    return options


def _edifice_name(name: str, model: nn.Module, names: Mapping[str, str]) -> str:
    from torch import nn

    block = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    number = str(int(block[1]) + 1) if block else ""
    if pattern in names:
        return names[pattern].replace("{}", number)
    path, _, leaf = pattern.rpartition(".")
    module = model.get_submodule(name.rpartition(".")[0])
    leaves = _NORM_LEAVES if isinstance(module, nn.LayerNorm) else _DENSE_LEAVES
    if path not in names:
        raise RequestError(
            f"{name} of {type(model).__name__} has no counterpart in Edifice, so these weights can't be Edifice's"
        )
    return f"{names[path].replace('{}', number)}/{leaves[leaf]}"
