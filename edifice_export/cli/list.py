"""The command `list`."""

from __future__ import annotations

from edifice_reference.models.registry import ARCHITECTURES

from .console import print_json, print_table
from .options import Json

__all__ = ["list_architectures"]


def list_architectures(as_json: Json = False) -> None:
    """List the architectures, one line each."""
    if as_json:
        print_json(
            [
                {"name": known.name, "summary": known.summary, "edifice_module": known.edifice_module}
                for known in ARCHITECTURES.values()
            ]
        )
    else:
        print_table([(known.name, known.summary) for known in ARCHITECTURES.values()])
