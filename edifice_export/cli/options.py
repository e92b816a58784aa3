"""Arguments and options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer

from ..defaults import OPSETS, PRECISIONS, TARGETS

__all__ = [
    "BundlePath",
    "Inline",
    "Json",
    "Opset",
    "Optimize",
    "Precision",
    "Providers",
    "Target",
    "Tolerance",
]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")]
Providers = Annotated[
    list[str] | None,
    typer.Option("--provider", metavar="NAME", help="Execution provider, such as cuda; repeat in order of preference."),
]

_SCANLESS = ", ".join(name for name, is_fast_at_scan in TARGETS.items() if not is_fast_at_scan)


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


Target = Annotated[
    str,
    typer.Option(
        parser=_one_of(TARGETS),
        metavar=f"<{'|'.join(TARGETS)}>",
        help=f"what to make it fast for: without Scan for {_SCANLESS}; it is right everywhere",
    ),
]
Precision = Annotated[
    str, typer.Option(parser=_one_of(PRECISIONS), metavar=f"<{'|'.join(PRECISIONS)}>", help="the type to compute in")
]
Optimize = Annotated[
    bool, typer.Option("--optimize/--no-optimize", help="apply the graph passes; the plain graph is for debugging")
]
Inline = Annotated[
    bool, typer.Option("--inline", help="make plain graphs without functions, for tools that don't read these")
]
Opset = Annotated[int, typer.Option(help=f"ONNX operator set [{OPSETS.start} to {OPSETS.stop - 1}]")]
Tolerance = Annotated[float, typer.Option(help="largest error allowed, absolute, or relative to an output above 1")]
