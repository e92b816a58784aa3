"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, print_table, say
from .options import Json

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="Folder of a bundle, or an ONNX model.")],
    batch: Annotated[int | None, typer.Option(help="Batch that costs are counted for [default: 1].")] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Frames that costs are counted for [default: a bundle's window].")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a bundle: window, stream or prefill [default: the first].")
    ] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Show which body each edifice op got, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a graph holds and costs."""
    from ..inspection.report import explain, inspect_path, rows_of

    model, inspection = inspect_path(path, batch, sequence, graph)
    lowerings = explain(model) if explained else []
    if as_json:
        print_json({"model": model, **inspection.to_dict(), **({"lowerings": lowerings} if explained else {})})
        return
    print_table([("model", model), *rows_of(inspection)])
    if explained:
        say()
        print_table([("node", "op", "lowering", "body", "why"), *(tuple(each.values()) for each in lowerings)])
