"""The command `convert`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .console import print_json, say
from .options import Json

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Weights: safetensors, .pt, .bin, .ckpt, .nx, .axon, Nx.serialize.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .safetensors, .nx, .axon or .nxbin.")],
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="[default: what IN states, or its names tell]")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Whose names a .safetensors OUT has, such as edifice [default: torch]."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="What IN can't tell, such as num_heads=4; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert weights between this project's files and Edifice's."""
    from ..weights.convert import convert as convert_weights

    options = _parse_options(option or [])
    done = convert_weights(source, target, architecture=architecture, names=names, **options)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    say(f"wrote {done.output}: {done.architecture}, {done.tensors} tensors, {done.parameters:,} parameters")
    for note in done.notes:
        say(note)


def _parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Options of an architecture from `name=value` texts; a value is a JSON number or boolean.

    Raises:
        RequestError: a text is not of that form, or names an option twice.
    """
    options: dict[str, Any] = {}
    for text in assignments:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        try:
            options[name] = options[name] if name in options else json.loads(value)
        except ValueError as error:
            raise RequestError(f"--option {text}: should be NAME=VALUE, such as num_heads=4") from error
    if len(options) < len(assignments):
        raise RequestError(f"--option {' '.join(assignments)}: names an option twice; give each once")
    return options
