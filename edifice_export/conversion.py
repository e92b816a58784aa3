"""Convert: a weights file of one format into another, checked to be a whole model on the way."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.config import OptionError
from edifice_reference.registry import Architecture, get_architecture

from .errors import RequestError
from .torch_import import require_torch

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoints import Checkpoint

__all__ = ["NAMES", "Conversion", "convert"]

NAMES = ("torch", "edifice")
"""Names in a safetensors file: this project's own, or Edifice's as `layer.param`."""

Written = Mapping[str, "Tensor"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        output: the file that was written.
        architecture: the architecture of the weights.
        tensors: how many tensors were written.
        parameters: how many numbers they hold.
        options: the options that the output states, or None if it states none: a raw format, or not all are known.
        unknown: options that the input neither states nor tells; the output states none then.
        numerics: those that the weights were used with so far.
    """

    output: str
    architecture: str
    tensors: int
    parameters: int
    options: dict[str, Any] | None
    unknown: list[str]
    numerics: str


def convert(
    source: str | Path,
    target: str | Path,
    *,
    architecture: str | None = None,
    names: str | None = None,
    **options: Any,
) -> Conversion:
    """Converts weights: any format that is read into .safetensors, .nx, .axon or .nxbin, as the target's suffix says.

    The tensors must be those of one architecture, all of them and none besides, or nothing is written. Edifice's
    formats get Edifice's names and layout. .nx and .safetensors state the architecture and the options that the source
    states or tells, or that are given, if those that change the output are among them; .axon and .nxbin hold tensors
    only. What a user noted in a checkpoint besides, such as its epoch, is not carried over.

    Args:
        source: a weights file of any format that checkpoints.read_checkpoint reads.
        target: the file to write; one that exists is replaced.
        architecture: its name; if None, what the source states, or what its tensors' names tell.
        names: for .safetensors `torch` (the default) or `edifice`.
        **options: the architecture's options that the source neither states nor tells.

    Raises:
        RequestError: the source can't be read or is no whole model, the target's format is unknown or can't be
            written, an option contradicts the source.
    """
    require_torch()
    from .checkpoints import (
        check_against,
        configure,
        from_edifice,
        known_options,
        read_checkpoint,
        recognise,
        untold_options,
    )
    from .reference_model import make_empty

    source, target = Path(source), Path(target)
    encode = _encoder(target, names)
    checkpoint = read_checkpoint(source)
    try:
        known = get_architecture(architecture) if architecture else checkpoint.architecture
        known = known or recognise(checkpoint.tensors)
        if known is None:
            raise RequestError(
                f"weights {source}: neither says its architecture nor has the names of one; give --architecture"
            )
        unknown = untold_options(known, checkpoint, options)
        least = {
            field.name: field.metadata["minimum"]
            for field in dataclasses.fields(known.config_class)
            if field.name in unknown
        }
        # No shape depends on an option that no shape tells: any value will do for the check.
        config = configure(known, checkpoint, {**options, **least})
        names_of = check_against(make_empty(known, config), known, checkpoint)
    except OptionError as error:
        raise RequestError(str(error)) from error
    found = {name: checkpoint.tensors[name] for name in names_of}
    parameters = from_edifice(found, known.name) if checkpoint.is_edifice else found
    certain = known_options(known, checkpoint, options)
    stated = None if unknown else {name: value for name, value in config.options().items() if name in certain}
    data = encode(parameters, known, stated, checkpoint)
    _write(target, data)
    return Conversion(
        output=str(target),
        architecture=known.name,
        tensors=len(parameters),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        options=stated if target.suffix in (".nx", ".safetensors") else None,
        unknown=unknown,
        numerics=checkpoint.numerics,
    )


_Encoder = Callable[[Mapping[str, "Tensor"], Architecture, "dict[str, Any] | None", "Checkpoint"], bytes]


def _encoder(target: Path, names: str | None) -> _Encoder:
    if names not in (None, *NAMES):
        raise RequestError(f"names must be {' or '.join(NAMES)}, got {names!r}")
    encoders = {".safetensors": _safetensors, ".nx": _nx_checkpoint, ".axon": _axon, ".nxbin": _nx}
    if target.suffix not in encoders:
        raise RequestError(
            f"{target}: {target.suffix or 'no suffix'} is no format to write; name it {', '.join(encoders)}"
        )
    if names == "torch" and target.suffix != ".safetensors":
        raise RequestError(f"{target}: {target.suffix} has Edifice's names; leave --names out or write .safetensors")
    return _edifice_safetensors if target.suffix == ".safetensors" and names == "edifice" else encoders[target.suffix]


def _safetensors(
    parameters: Written, architecture: Architecture, options: dict[str, Any] | None, checkpoint: Checkpoint
) -> bytes:
    from .checkpoints import encode_safetensors, own_metadata

    metadata = own_metadata(architecture.name, options, checkpoint.numerics)
    return encode_safetensors(parameters, metadata)


def _edifice_safetensors(
    parameters: Written, architecture: Architecture, options: dict[str, Any] | None, _checkpoint: Checkpoint
) -> bytes:
    from .checkpoints import encode_safetensors, own_metadata, to_edifice

    tensors = {name.replace("/", "."): tensor for name, tensor in to_edifice(parameters, architecture.name).items()}
    return encode_safetensors(tensors, own_metadata(architecture.edifice_module, options, "edifice"))


def _nx_checkpoint(
    parameters: Written, architecture: Architecture, options: dict[str, Any] | None, _checkpoint: Checkpoint
) -> bytes:
    from .checkpoints import to_edifice
    from .checkpoints.nx_checkpoint import write_nx_checkpoint

    tensors = to_edifice(parameters, architecture.name)
    return write_nx_checkpoint(tensors, architecture.name, options, compressed=False)


def _nx(
    parameters: Written, architecture: Architecture, _options: dict[str, Any] | None, _checkpoint: Checkpoint
) -> bytes:
    from .checkpoints import to_edifice
    from .checkpoints.nx import write_nx

    return write_nx(to_edifice(parameters, architecture.name))


def _axon(
    parameters: Written, architecture: Architecture, _options: dict[str, Any] | None, _checkpoint: Checkpoint
) -> bytes:
    from .checkpoints import to_edifice
    from .checkpoints.nx import write_axon

    return write_axon(to_edifice(parameters, architecture.name))


def _write(target: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    if target.is_dir():
        raise RequestError(f"{target}: is a folder; name a file in it")
    if not target.parent.is_dir():
        raise RequestError(f"{target}: there is no folder {target.parent}; make it before")
    # A folder on the same disk, not mkstemp: its file gets the permissions any new file would.
    with tempfile.TemporaryDirectory(prefix=".edifice-export-", dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        unfinished.write_bytes(data)
        os.replace(unfinished, target)
