"""The command `scaffold`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, say
from .options import BundlePath, Json

__all__ = ["scaffold"]


def scaffold(
    language: Annotated[str, typer.Argument(metavar="cpp|csharp|node|web", help="Language of the sample.")],
    bundle: BundlePath,
    output: Annotated[Path, typer.Option(help="New folder for the sample and a copy of the bundle.")],
    as_json: Json = False,
) -> None:
    """Write a sample program in another language, with a bundle beside it."""
    from ..scaffolding.scaffold import scaffold as write_sample

    done = write_sample(language, bundle, output)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    say(f"wrote {done.output}: {language}/ and bundle/ ({done.architecture}); {done.readme} says how to run it")
