"""Convert: a weights file of one format into another, checked to be a whole model on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import OptionError
from edifice_reference.models.registry import Architecture, get_architecture

from ..errors import RequestError
from ..machine import require_torch
from ..writing.files import check_output, replacing, same_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NAMES", "Conversion", "convert"]

NAMES = ("torch", "edifice")
"""Names in a safetensors file: this project's own, or Edifice's as `layer.param`."""

_SUFFIXES = (".safetensors", ".nx", ".axon", ".nxbin")
_STATING = (".safetensors", ".nx")
"""Formats that state an architecture and its options."""


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
        notes: what the user should know of the output, a sentence each.
    """

    output: str
    architecture: str
    tensors: int
    parameters: int
    options: dict[str, Any] | None
    unknown: list[str]
    notes: list[str]


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
    from ..programs.reference_model import make_empty
    from . import (
        check_against,
        configure,
        from_edifice,
        known_options,
        read_checkpoint,
        recognise,
        untold_options,
    )

    source, target = Path(source), Path(target)
    _check_target(source, target, names)
    checkpoint = read_checkpoint(source)
    try:
        known = get_architecture(architecture) if architecture else checkpoint.architecture
        known = known or recognise(checkpoint.tensors)
        if known is None:
            raise RequestError(
                f"weights {source}: neither says its architecture nor has the names of one; give --architecture"
            )
        unknown = untold_options(known, checkpoint, options, stream=False)
        least = {
            field.name: field.metadata["minimum"]
            for field in dataclasses.fields(known.config_class)
            if field.name in unknown
        }
        # No shape depends on an option that no shape tells: any value will do for the check.
        config = configure(known, checkpoint, {**options, **least}, stream=False)
        names_of = check_against(make_empty(known, config), known, checkpoint)
    except OptionError as error:
        raise RequestError(str(error)) from error
    found = {name: checkpoint.tensors[name] for name in names_of}
    parameters = from_edifice(found, known.name) if checkpoint.is_edifice else found
    certain = known_options(known, checkpoint, options)
    stated = None if unknown else {name: value for name, value in config.options().items() if name in certain}
    data = _encode(parameters, known, stated, checkpoint.numerics, target.suffix, names)
    with replacing(target) as unfinished:
        unfinished.write_bytes(data)
    return Conversion(
        output=str(target),
        architecture=known.name,
        tensors=len(parameters),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        options=stated if target.suffix in _STATING else None,
        unknown=unknown,
        notes=list(_notes(source, target, names, checkpoint.numerics, unknown)),
    )


def _check_target(source: Path, target: Path, names: str | None) -> None:
    if names not in (None, *NAMES):
        raise RequestError(f"names must be {' or '.join(NAMES)}, got {names!r}")
    if target.suffix not in _SUFFIXES:
        found = target.suffix or "a name without a suffix"
        raise RequestError(f"{target}: {found} is no format to write; name it {', '.join(_SUFFIXES)}")
    if names == "torch" and target.suffix != ".safetensors":
        raise RequestError(f"{target}: {target.suffix} has Edifice's names; leave --names out or write .safetensors")
    if same_file(source, target):
        raise RequestError(f"{target}: is the input, {source}; name another file")
    check_output(target)
    if not target.parent.is_dir():
        raise RequestError(f"{target}: there is no folder {target.parent}; make it before")


def _encode(
    parameters: Mapping[str, Tensor],
    architecture: Architecture,
    options: dict[str, Any] | None,
    numerics: str,
    suffix: str,
    names: str | None,
) -> bytes:
    from . import encode_safetensors, own_metadata, to_edifice
    from .formats.nx import write_axon, write_nx
    from .formats.nx_checkpoint import write_nx_checkpoint

    if suffix == ".safetensors" and names != "edifice":
        return encode_safetensors(parameters, own_metadata(architecture.name, options, numerics))
    tensors = to_edifice(parameters, architecture.name)
    match suffix:
        case ".safetensors":
            dotted = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
            return encode_safetensors(dotted, own_metadata(architecture.edifice_module, options, "edifice"))
        case ".nx":
            return write_nx_checkpoint(tensors, architecture.name, options, compressed=False)
        case ".axon":
            return write_axon(tensors)
        case _:
            return write_nx(tensors)


def _notes(source: Path, target: Path, names: str | None, numerics: str, unknown: list[str]) -> Iterator[str]:
    if numerics == "standard" and (names == "edifice" or target.suffix != ".safetensors"):
        yield f"{source} has standard numerics; Edifice computes with its own, and so does what is built from {target}"
    if unknown and target.suffix in _STATING:
        wanted = " ".join(f"--option {name}=..." for name in unknown)
        yield f"{target} states no options: {source} doesn't say {', '.join(unknown)}; give {wanted}"
