"""Convert: a weights file of one format into another, checked to be a whole model on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import OptionError
from edifice_reference.models.registry import Architecture, get_architecture

from ..arguments import path_of, text
from ..errors import RequestError
from ..machine import require_torch
from ..writing.files import check_output, replacing, same_file
from .sources import OWN, SOURCES, Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Conversion", "convert"]

_SUFFIXES = (".safetensors", ".nx", ".axon", ".nxbin")
_FORMAT_NAMES = SOURCES["edifice"]
"""Whose names all other formats have."""

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
        source: a weights file of any format that weights.read_checkpoint reads.
        target: the file to write; one that exists is replaced.
        architecture: its name; if None, what the source states, or what its tensors' names tell.
        names: whose a .safetensors file gets: `torch` (the default), or of another source, such as `edifice`.
        **options: the architecture's options that the source neither states nor tells.

    Raises:
        RequestError: the source can't be read or is no whole model, the target's format is unknown or can't be
            written, an option contradicts the source.
    """
    source, target = path_of("source", source), path_of("target", target)
    if architecture is not None:
        text("architecture", architecture)
    if names is not None:
        text("names", names, (OWN.name, *SOURCES))
    require_torch()
    from ..programs.reference_model import make_empty
    from . import (
        check_against,
        configure,
        describe_weights,
        known_options,
        parameter,
        read_checkpoint,
        recognise,
        untold_options,
    )

    _check_target(source, target, names)
    checkpoint = read_checkpoint(source)
    try:
        known = get_architecture(architecture) if architecture is not None else checkpoint.architecture
        known = known or recognise(checkpoint)
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
    parameters = {own: parameter(checkpoint, theirs, own) for theirs, own in names_of.items()}
    certain = known_options(known, checkpoint, options)
    stated = None if unknown else {name: value for name, value in config.options().items() if name in certain}
    data = _encode(parameters, known, stated, checkpoint.numerics, target.suffix, _written(target, names))
    with replacing(target) as unfinished:
        unfinished.write_bytes(data)
    done = describe_weights(checkpoint.changes())
    return Conversion(
        output=str(target),
        architecture=known.name,
        tensors=len(parameters),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        options=stated if target.suffix in _STATING else None,
        unknown=unknown,
        notes=[
            *([done] if done is not None else []),
            *_notes(source, target, _written(target, names), checkpoint.numerics, unknown),
        ],
    )


def _check_target(source: Path, target: Path, names: str | None) -> None:
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


def _written(target: Path, names: str | None) -> Source:
    """Whose names a file gets."""
    return _FORMAT_NAMES if target.suffix != ".safetensors" else SOURCES.get(str(names), OWN)


def _encode(
    parameters: Mapping[str, Tensor],
    architecture: Architecture,
    options: dict[str, Any] | None,
    numerics: str,
    suffix: str,
    source: Source,
) -> bytes:
    from . import encode_safetensors, own_metadata
    from .formats.nx import write_axon, write_nx
    from .formats.nx_checkpoint import write_nx_checkpoint

    tensors = {
        source.theirs(name, architecture): source.lay_out(tensor, name).contiguous()
        for name, tensor in parameters.items()
    }
    match suffix:
        case ".safetensors":
            filed = {source.filed(name): tensor for name, tensor in tensors.items()}
            numerics = numerics if source is OWN else source.numerics
            return encode_safetensors(filed, own_metadata(source.titles(architecture)[0], options, numerics))
        case ".nx":
            return write_nx_checkpoint(tensors, architecture.name, options, compressed=False)
        case ".axon":
            return write_axon(tensors)
        case _:
            return write_nx(tensors)


def _notes(source: Path, target: Path, written: Source, numerics: str, unknown: list[str]) -> Iterator[str]:
    if numerics == "standard" and written.numerics == "edifice":
        yield f"{source} has standard numerics; Edifice computes with its own, and so does what is built from {target}"
    if unknown and target.suffix in _STATING:
        wanted = " ".join(f"--option {name}=..." for name in unknown)
        yield f"{target} states no options: {source} doesn't say {', '.join(unknown)}; give {wanted}"
