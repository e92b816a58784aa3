"""The options of a model: those asked for, those that a weights file states, those that its tensors' shapes tell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from edifice_reference.models.config import Config, OptionError, checked
from edifice_reference.models.registry import Architecture

from ..errors import RequestError
from .checkpoint import Checkpoint

__all__ = ["configure", "known_options", "own_metadata", "untold_options"]


def configure(
    architecture: Architecture, checkpoint: Checkpoint | None, given: Mapping[str, Any], stream: bool
) -> Config:
    """The options of a model: what a checkpoint says or tells of them, and what was given besides.

    A checkpoint that states options was made with those, and with the defaults of the others. Of one that states none,
    the shapes of the tensors tell most, and what they can't tell must be given; for a `stream`, the window too where it
    ends what attention sees.

    Raises:
        RequestError: the checkpoint is of another architecture; an option is unknown, contradicts the checkpoint, or is
            needed and neither given nor told.
        OptionError: an option that was given is out of its range.
    """
    _check_given(architecture, checkpoint, given)
    if checkpoint is None:
        return architecture.config_class(**given)
    untold = untold_options(architecture, checkpoint, given, stream)
    if untold:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in untold)
        raise RequestError(
            f"weights {checkpoint.place}: does not say {' and '.join(untold)}, which no tensor's shape tells and which "
            f"the output depends on; give {flags}"
        )
    options = _told(architecture, checkpoint, given)
    stated = checkpoint.options is not None
    try:
        config = architecture.config_class(**options)
    except OptionError as error:
        cause = "made with options" if stated else "the shapes of its tensors and the options given make a model"
        raise RequestError(f"weights {checkpoint.place}: {cause} that can't be: {error}") from error
    source = "was made with" if stated else "has tensors whose shapes say"
    for name, value in given.items():
        if value != getattr(config, name):
            raise RequestError(
                f"{name} {value} contradicts weights {checkpoint.place}, which {source} {name} "
                f"{getattr(config, name)}; leave the option out"
            )
    return config


def untold_options(
    architecture: Architecture, checkpoint: Checkpoint, given: Mapping[str, Any], stream: bool
) -> list[str]:
    """The options that change an output, of a window or a stream, and that neither file, shapes nor caller says."""
    config_class = architecture.config_class
    windowed = {"window_size"} if stream and config_class.stream_ends_with_window else set()
    if checkpoint.options is not None:
        # What Edifice's files leave out had its default; a converted file may just not know.
        return [] if checkpoint.source.leaves_out_defaults else sorted(windowed - {*checkpoint.options, *given})
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if (field.metadata["untold"] or field.name in windowed) and field.name not in given
    ]


def known_options(architecture: Architecture, checkpoint: Checkpoint, given: Mapping[str, Any]) -> set[str]:
    """The options that the caller, the checkpoint or its shapes say; the others are defaults that nobody asked for.

    A checkpoint that states options says all that change the output: those it leaves out had their defaults.
    """
    known = {*given, *_told(architecture, checkpoint, given)}
    if checkpoint.options is not None:
        names = (field.name for field in dataclasses.fields(architecture.config_class))
        known |= {name for name in names if not _is_free(architecture, name)}
    return known


def own_metadata(architecture: str, options: Mapping[str, Any] | None, numerics: str) -> dict[str, str]:
    """What this project writes into a safetensors file beside the tensors; without options if not all are known."""
    metadata = {"module": architecture, "numerics": numerics}
    return metadata if options is None else {**metadata, "options": json.dumps(dict(options), sort_keys=True)}


def _is_free(architecture: Architecture, name: str) -> bool:
    """Whether an option changes neither a parameter nor an output."""
    return name == "dropout" or (name == "window_size" and not architecture.config_class.window_binds)


def _told(architecture: Architecture, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    if checkpoint.options is not None:
        # What it does not state are the defaults it was made with; those that change no output may be chosen.
        free = {name: value for name, value in given.items() if _is_free(architecture, name)}
        return {**free, **checkpoint.options}
    told = architecture.config_class.told_by(checkpoint.shapes(architecture), given)
    return {**given, **{name: value for name, value in told.items() if value is not None}}


def _check_given(architecture: Architecture, checkpoint: Checkpoint | None, given: Mapping[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(architecture.config_class)}
    stated: Mapping[str, Any] = {}
    if checkpoint is not None:
        stated = checkpoint.options or {}
        if checkpoint.architecture not in (None, architecture):
            raise RequestError(
                f"weights {checkpoint.place}: made with {checkpoint.architecture.name}, "
                f"and {architecture.name} was asked for; ask for that, or give other weights"
            )
    for source, names in (("", given), (f"weights {checkpoint.place}: " if checkpoint else "", stated)):
        unknown = sorted(set(names) - set(fields))
        if unknown:
            raise RequestError(
                f"{source}unknown option {unknown[0]!r} of {architecture.name}; there are {', '.join(sorted(fields))}"
                + ("; save the parameters without it" if source else "")
            )
    for name, value in given.items():
        checked(fields[name], value)
