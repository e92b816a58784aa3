"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..defaults import DEFAULT_OPSET, PRECISIONS, TOLERANCE
from .console import print_json, progress_bar, say
from .options import Inline, Json, Opset, Optimize, Precision, Target, Tolerance

__all__ = ["export"]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:NAME",
            help="Code that makes a module, or package.module:NAME; it is run. See docs/export.md.",
        ),
    ],
    target: Target = "portable",
    precision: Precision = PRECISIONS[0],
    optimize: Optimize = True,
    inline: Inline = False,
    opset: Opset = DEFAULT_OPSET,
    seed: Annotated[int, typer.Option(help="of the test data")] = 0,
    tolerance: Tolerance = TOLERANCE,
    output: Annotated[
        Path | None, typer.Option(help="folder to write [default: exported/ and the name of the module's class]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a torch module of your own to a verified bundle."""
    from ..building.export import export_source
    from ..building.settings import Settings
    from ..bundle.manifest import plain
    from ..machine import require_torch
    from ..programs.source import load_source
    from ..verification.report import describe_amplified, describe_stream

    settings = Settings(target, optimize, inline, opset, seed, tolerance, precision)
    require_torch()
    with progress_bar("verifying") as progress:
        bundle = export_source(load_source(source), output, settings, progress)
    manifest = bundle.manifest
    if as_json:
        print_json({"bundle": str(bundle.path), **plain(manifest)})
        return
    parity = manifest.parity
    say(f"exported {bundle.path}: {manifest.program.name}, opset {manifest.opset}")
    for name, graph in manifest.graphs.items():
        takes, gives = (", ".join(map(str, specs)) for specs in manifest.own_tensors(name))
        say(f"{name}: {takes} -> {gives}; {graph.model}")
    say(
        f"verified: ONNX Runtime agrees with the {parity['reference']} in {parity['cases']} cases, at "
        f"{parity['sizes']} different sizes; largest error {parity['max_rel']:.1e} relative"
    )
    if parity["frames"]:
        say(describe_stream(parity["frames"], parity["histories"]))
    if "stream" in manifest.graphs and "prefill" not in manifest.graphs:
        say("no prefill graph: the module has no extend(*frames, state), and its forward takes no state")
    if parity["amplified"]:
        say(describe_amplified(parity["amplified"]))
