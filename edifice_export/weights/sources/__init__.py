"""Whose names and layouts tensors have, to and from the reference models' own: a source a file, which registers it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from .own import OWN
from .registry import OF_GRAPHS, SOURCES, Named, Source

__all__ = ["OF_GRAPHS", "OWN", "SOURCES", "Named", "Source", "source_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def source_of(names: Sequence[str]) -> tuple[Source, Named]:
    """Whose names these are, and the names as they have them; those of a bundle's graphs are left out."""
    names = [name for name in names if not name.startswith(OF_GRAPHS)]
    for source in SOURCES.values():
        named = source.read(names)
        if named is not None:
            return source, named
    return OWN, OWN.read(names)
