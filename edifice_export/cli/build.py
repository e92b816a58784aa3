"""The sub-commands of `build`: one per architecture, made from its config dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from edifice_reference.models.config import describe_range
from edifice_reference.models.registry import ARCHITECTURES, Architecture, get_architecture

from ..defaults import DEFAULT_OPSET, PRECISIONS, TOLERANCE
from ..errors import RequestError
from .console import print_json, progress_bar, say
from .options import Inline, Opset, Optimize, Precision, Target, Tolerance

__all__ = ["BuildGroup"]


class Numerics(StrEnum):
    """The mathematics, or Edifice to rounding."""

    standard = "standard"
    edifice = "edifice"


class Graph(StrEnum):
    """Which graphs a bundle gets."""

    window = "window"
    stream = "stream"
    both = "both"


class BuildGroup(TyperGroup):
    """Finds an architecture's command when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The names of the architectures."""
        return list(ARCHITECTURES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command of one architecture.

        Raises:
            OptionError: there is no such architecture.
        """
        return _command(get_architecture(cmd_name))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the architecture's name, which must be there."""
        if not args:
            raise RequestError(f"build: name an architecture; there are {', '.join(ARCHITECTURES)}")
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Lists the architectures without making their commands."""
        with formatter.section("Architectures"):
            formatter.write_dl([(name, architecture.summary) for name, architecture in ARCHITECTURES.items()])


def _command(architecture: Architecture) -> Any:
    config_class = architecture.config_class
    options = dataclasses.fields(config_class)

    def command(**values: Any) -> None:
        given = {option.name: values.pop(option.name) for option in options}
        _build(architecture, {name: value for name, value in given.items() if value is not None}, **values)

    command.__doc__ = f"Build a verified bundle of {architecture.name}: {architecture.summary}."
    parameters = [_parameter(option) for option in options]
    parameters += list(inspect.signature(_build, eval_str=True).parameters.values())[2:]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(architecture.name)(command)
    return get_command(app)


def _parameter(option: dataclasses.Field[Any]) -> inspect.Parameter:
    kind: Any = type(option.default)
    default = f"default {str(option.default).lower()}"
    text = f"{option.metadata['help']} [{default if kind is bool else f'{describe_range(option)}; {default}'}]"
    annotation = Annotated[kind | None, typer.Option(help=text, show_default=False)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _build(
    architecture: Architecture,
    options: dict[str, Any],
    weights: Annotated[
        Path | None,
        typer.Option(help="safetensors, .pt, .bin, .ckpt, .nx or .axon: see docs/weights.md [default: fresh weights]"),
    ] = None,
    numerics: Annotated[
        Numerics | None,
        typer.Option(help="the mathematics, or Edifice to rounding [default: edifice for Edifice's weights]"),
    ] = None,
    graph: Annotated[
        Graph, typer.Option(help="a whole window at once, one frame at a time with a state, or both")
    ] = Graph.both,
    target: Target = "portable",
    precision: Precision = PRECISIONS[0],
    optimize: Optimize = True,
    inline: Inline = False,
    opset: Opset = DEFAULT_OPSET,
    seed: Annotated[int, typer.Option(help="of fresh weights and of the test data")] = 0,
    tolerance: Tolerance = TOLERANCE,
    output: Annotated[Path | None, typer.Option(help="folder to write [default: exported/ARCHITECTURE]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the manifest as JSON")] = False,
) -> None:
    from ..building.build import build
    from ..bundle.manifest import plain
    from ..verification.report import describe_amplified, describe_gap, describe_stream
    from ..weights import describe_weights

    with progress_bar("verifying") as progress:
        bundle = build(
            architecture.name,
            output=output,
            weights=weights,
            numerics=numerics.value if numerics is not None else None,
            graph=graph.value,
            target=target,
            precision=precision,
            optimize=optimize,
            inline=inline,
            opset=opset,
            seed=seed,
            tolerance=tolerance,
            progress=progress,
            **options,
        )
    manifest = bundle.manifest
    if as_json:
        print_json({"bundle": str(bundle.path), **plain(manifest)})
        return
    parity = manifest.parity
    prefixes, window = parity["prefixes"], manifest.window_size
    count = "every prefix length" if prefixes == window else f"{prefixes} of the {window} prefix lengths"
    among = f", {count} of the window among them" if prefixes else ""
    say(f"built {bundle.path}: {architecture.name}, {manifest.program.numerics} numerics, opset {manifest.opset}")
    if (changes := describe_weights(manifest.weights)) is not None:
        say(changes)
    say(
        f"verified: ONNX Runtime agrees with the {parity['reference']} in {parity['cases']} cases{among}; "
        f"largest error {parity['max_abs']:.1e}"
    )
    if parity["frames"]:
        say(describe_stream(parity["frames"], parity["histories"]))
    if parity["amplified"]:
        say(describe_amplified(parity["amplified"]))
    if parity["recurrence_gap"] is not None:
        say(describe_gap(parity["recurrence_gap"]))
