"""What a weights file says, whatever its format, and how it becomes the parameters of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.config import NUMERICS
from edifice_reference.registry import ARCHITECTURES, Architecture

from ..errors import RequestError
from . import edifice

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Checkpoint", "load_into", "read_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of a weights file and what the file says of the model they belong to.

    Attributes:
        path: the file.
        tensors: by name: this project's own (`blocks.0.norm.weight`) or Edifice's (`hymba_block_1_norm/gamma`).
        architecture: the architecture the file says it was made with, or None.
        options: the options the file says it was made with, or None.
        numerics: the numerics to use unless others are asked for.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    architecture: Architecture | None
    options: Mapping[str, Any] | None
    numerics: str

    @property
    def is_edifice(self) -> bool:
        """Whether the tensors bear Edifice's names."""
        return edifice.has_edifice_names(self.tensors)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a weights file.

    Raises:
        RequestError: the file is missing, unreadable, of an unknown format, or says something that can't be used.
    """
    try:
        return _read(path)
    except OSError as error:
        raise RequestError(
            f"--weights {path}: can't be read: {error.strerror}; check the path and its rights"
        ) from error


def _read(path: Path) -> Checkpoint:
    from .safetensors import read_safetensors

    if not path.exists():
        raise RequestError(f"--weights {path}: there is no such file")
    if not path.is_file():
        raise RequestError(f"--weights {path}: is not a file; give a .safetensors file")
    if path.suffix != ".safetensors":
        raise RequestError(f"--weights {path}: {path.suffix or 'no suffix'} is no known format; give .safetensors")
    tensors, metadata = read_safetensors(path)
    architecture = _architecture(path, metadata.get("module"))
    options = edifice.parse_options(path, metadata["options"]) if "options" in metadata else None
    numerics = metadata.get("numerics", "edifice" if edifice.has_edifice_names(tensors) else "standard")
    if numerics not in NUMERICS:
        raise RequestError(f"--weights {path}: its metadata says numerics {numerics!r}, not {' or '.join(NUMERICS)}")
    return Checkpoint(path, tensors, architecture, options, numerics)


def load_into(model: nn.Module, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's tensors into the model's parameters: all of them, none left over.

    Raises:
        RequestError: a tensor is missing, unexpected, or has another shape, another dtype, or a NaN or infinity; the
            message names it as the file does, and says what was expected and what was found.
    """
    import torch

    try:
        names = edifice.to_edifice_names(model, architecture) if checkpoint.is_edifice else None
    except RequestError as error:
        raise RequestError(f"--weights {checkpoint.path}: {error}") from error
    parameters = dict(model.named_parameters())
    named = {(names[name] if names else name): name for name in parameters}
    _check_names(checkpoint, architecture, set(named))
    with torch.no_grad():
        for file_name, name in named.items():
            parameter = parameters[name]
            expected = edifice.reverse_axes(parameter, name) if names else parameter
            tensor = checkpoint.tensors[file_name]
            _check_tensor(checkpoint.path, file_name, tensor, expected)
            parameter.copy_(edifice.reverse_axes(tensor, name) if names else tensor)


def _architecture(path: Path, module: str | None) -> Architecture | None:
    if module is None:
        return None
    for architecture in ARCHITECTURES.values():
        if module in (architecture.name, architecture.edifice_module):
            return architecture
    known = ", ".join(architecture.edifice_module for architecture in ARCHITECTURES.values())
    raise RequestError(f"--weights {path}: made with {module!r}, which is not known here; known are {known}")


def _check_names(checkpoint: Checkpoint, architecture: Architecture, expected: set[str]) -> None:
    missing = sorted(expected - set(checkpoint.tensors))
    unexpected = sorted(
        name
        for name, tensor in checkpoint.tensors.items()
        # Edifice writes parameters of size zero, such as the keys of no meta tokens.
        if name not in expected and (tensor.numel() > 0 or not edifice.is_known(name, architecture))
    )
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise RequestError(
            f"--weights {checkpoint.path}: its tensors are not those of the model that was asked for: "
            f"{' and '.join(problems)}; check the architecture and its options"
        )


def _check_tensor(path: Path, name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise RequestError(
            f"--weights {path}: {name} should be {list(expected.shape)} and is {list(tensor.shape)}; check the options"
        )
    if tensor.dtype != expected.dtype:
        raise RequestError(
            f"--weights {path}: {name} should be {_dtype(expected)} and is {_dtype(tensor)}; convert it before"
        )
    finite = tensor.isfinite()
    if not finite.all():
        place = (~finite).nonzero()[0]
        raise RequestError(
            f"--weights {path}: {name} holds {tensor[tuple(place)].item()} at {place.tolist()}; give finite weights"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
