"""What a weights file says, whatever its format, and how it becomes the parameters of a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import NUMERICS, Shapes
from edifice_reference.models.registry import ARCHITECTURES, Architecture

from ..arguments import check_name
from ..errors import RequestError, brief
from .formats.error import FormatError
from .formats.nx_checkpoint import fold_width, read_nx_checkpoint, spec_of
from .sources import edifice

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Checkpoint", "check_against", "load_into", "read_checkpoint"]

FORMATS = "safetensors, Edifice's .nx checkpoints, and what Nx.serialize writes (.axon among it)"


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

    def shapes(self, architecture: Architecture) -> Shapes:
        """Shapes of the tensors by the names and in the layout of a reference model; tensors not of it are left out."""
        shapes = {}
        for name, tensor in self.tensors.items():
            own = edifice.from_edifice_name(name, architecture) if self.is_edifice else name
            if own is not None:
                shapes[own] = tuple(edifice.reverse_axes(tensor, own).shape if self.is_edifice else tensor.shape)
        return shapes


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a weights file; its bytes, not its name, say which format it is.

    Raises:
        RequestError: the file is missing, unreadable, damaged, of an unknown format, or says something that can't be
            used.
    """
    check_name(path, "weights")
    try:
        if not path.exists():
            raise RequestError(f"weights {path}: there is no such file; check the path")
        if not path.is_file():
            raise RequestError(f"weights {path}: is not a file; give {FORMATS}")
        return _read(path)
    except FormatError as error:
        raise RequestError(f"weights {path}: {error}") from error
    except OSError as error:
        raise RequestError(f"weights {path}: can't be read: {error.strerror}; check the path and its rights") from error


def load_into(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Copies a checkpoint's tensors into a model's parameters, as `check_against` found that they belong."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for file_name, name in names.items():
            tensor = checkpoint.tensors[file_name]
            parameters[name].copy_(edifice.reverse_axes(tensor, name) if checkpoint.is_edifice else tensor)


def check_against(model: nn.Module, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, str]:
    """Checks that a checkpoint's tensors are the parameters of a model: all of them, none left over.

    Args:
        model: may be without memory, on torch's meta device.
        architecture: of the model.
        checkpoint: the tensors.

    Returns:
        The parameter's name for each of the checkpoint's.

    Raises:
        RequestError: a tensor is missing, unexpected, or has another shape, another dtype, or a NaN or infinity; the
            message names it as the file does, and says what was expected and what was found.
    """
    parameters = dict(model.named_parameters())
    as_edifice = checkpoint.is_edifice
    try:
        named = {edifice.to_edifice_name(name, architecture) if as_edifice else name: name for name in parameters}
    except RequestError as error:
        raise RequestError(f"weights {checkpoint.path}: {error}") from error
    _check_names(checkpoint, architecture, set(named))
    for file_name, name in named.items():
        expected = edifice.reverse_axes(parameters[name], name) if as_edifice else parameters[name]
        _check_tensor(checkpoint.path, file_name, checkpoint.tensors[file_name], expected)
    return named


def _read(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise FormatError("the file is empty; copy it again")
    if start.startswith(b"nx"):
        from .formats.nx import read_nx

        return Checkpoint(path, read_nx(path.read_bytes()), None, None, "edifice")
    # After five bytes of header: Nx.serialize, zlib, or an Erlang term. In safetensors this is the 2^40s of a length.
    if start[0] in (0, 1) and start[5:6] in (b"n", b"\x78", b"\x83"):
        return _read_nx_checkpoint(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise FormatError("is a pickle, which can run code; save a state_dict() with safetensors.torch.save_file")
    raise FormatError(f"is of no known format, or damaged at its beginning; give {FORMATS}")


def _read_safetensors(path: Path) -> Checkpoint:
    from .formats.safetensors import read_safetensors

    tensors, metadata = read_safetensors(path)
    architecture = _architecture(metadata["module"]) if "module" in metadata else None
    options = _parse_options(metadata["options"]) if "options" in metadata else None
    numerics = metadata.get("numerics", "edifice" if edifice.has_edifice_names(tensors) else "standard")
    if numerics not in NUMERICS:
        raise FormatError(f"its metadata says numerics {numerics!r}, not {' or '.join(NUMERICS)}")
    return Checkpoint(path, tensors, architecture, options, numerics)


def _read_nx_checkpoint(path: Path) -> Checkpoint:
    tensors, metadata = read_nx_checkpoint(path.read_bytes())
    spec = spec_of(metadata)
    if spec is None:
        return Checkpoint(path, tensors, None, None, "edifice")
    return Checkpoint(path, tensors, _architecture(spec[0]), _rename_options(spec[1]), "edifice")


def _architecture(module: str) -> Architecture:
    for architecture in ARCHITECTURES.values():
        if module in (architecture.name, architecture.edifice_module, f"Elixir.{architecture.edifice_module}"):
            return architecture
    known = ", ".join(architecture.edifice_module for architecture in ARCHITECTURES.values())
    raise FormatError(f"made with {module!r}, which is not known here; known are {known}")


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its metadata `options` is not JSON: {brief(error)}") from error
    if not isinstance(options, dict):
        raise FormatError(f"its metadata `options` is not a JSON object but a {type(options).__name__}")
    return _rename_options(fold_width(options))


def _rename_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those of no value; `seq_len`, which Edifice takes in place of window_size, becomes that."""
    options = {name: value for name, value in options.items() if value is not None}
    if "seq_len" in options:
        options["window_size"] = options.pop("seq_len")
    return options


def _check_names(checkpoint: Checkpoint, architecture: Architecture, expected: set[str]) -> None:
    missing = sorted(expected - set(checkpoint.tensors))
    unexpected = sorted(
        name
        for name, tensor in checkpoint.tensors.items()
        # Edifice writes parameters of size zero, such as the keys of no meta tokens.
        if name not in expected and (tensor.numel() > 0 or edifice.from_edifice_name(name, architecture) is None)
    )
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise RequestError(
            f"weights {checkpoint.path}: its tensors are not those of the {architecture.name} that was asked for: "
            f"{' and '.join(problems)}; check the architecture and its options"
        )


def _check_tensor(path: Path, name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise RequestError(
            f"weights {path}: {name} should be {list(expected.shape)} and is {list(tensor.shape)}; check the options"
        )
    if tensor.dtype != expected.dtype:
        raise RequestError(
            f"weights {path}: {name} should be {_dtype(expected)} and is {_dtype(tensor)}; convert it before"
        )
    finite = tensor.isfinite()
    if not finite.all():
        place = (~finite).nonzero()[0]
        raise RequestError(
            f"weights {path}: {name} holds {tensor[tuple(place)].item()} at {place.tolist()}; give finite weights"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
