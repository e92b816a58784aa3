"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["BundlePath", "Json", "Providers"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")]
Providers = Annotated[
    list[str] | None,
    typer.Option("--provider", metavar="NAME", help="Execution provider, such as cuda; repeat in order of preference."),
]
