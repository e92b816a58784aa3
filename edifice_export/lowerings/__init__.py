"""ONNX function bodies of the edifice ops: one file per op, its lowerings side by side, which registers them.

Bodies use operators whose meaning is the same from opset 18 to 26, so that linking may set the version. They are plain
ONNX: any runtime runs them, and a kernel that is registered under a body's name (see body_names) goes before it.
"""

from __future__ import annotations

import importlib
import pkgutil

from .registry import HELPERS, LOWERINGS, op_of_node

__all__ = ["HELPERS", "LOWERINGS", "op_of_node"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
