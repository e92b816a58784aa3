"""From state-space, long-convolution and hybrid sequence models to verified ONNX bundles, and running those.

import edifice_export as ee

bundle = ee.build("hymba", weights="bot.safetensors", output="exported/bot")
report = ee.verify(bundle)
model = ee.load("exported/bot", providers=["cuda", "cpu"])
y = model(x)
stream = model.stream(batch=1)
y = stream.step(frame)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark.bench import bench
    from .benchmark.results import BenchReport, BenchResult
    from .bundle import Bundle
    from .checkpoints import from_edifice, to_edifice
    from .conversion import Conversion, convert
    from .doctor import diagnose
    from .errors import CheckError, ExportError, RequestError
    from .export import build
    from .functions.lowering import Call, Lowering
    from .functions.own_op import op
    from .inspection import inspect_model
    from .parity import verify
    from .runtime.model import Model, load
    from .runtime.stream import Snapshot, Stream
    from .samples import Scaffold, scaffold

__all__ = [
    "BenchReport",
    "BenchResult",
    "Bundle",
    "Call",
    "CheckError",
    "Conversion",
    "ExportError",
    "Lowering",
    "Model",
    "RequestError",
    "Scaffold",
    "Snapshot",
    "Stream",
    "bench",
    "build",
    "convert",
    "diagnose",
    "from_edifice",
    "inspect_model",
    "load",
    "op",
    "scaffold",
    "to_edifice",
    "verify",
]

_HOMES = {
    "BenchReport": "benchmark.results",
    "BenchResult": "benchmark.results",
    "Bundle": "bundle",
    "Call": "functions.lowering",
    "CheckError": "errors",
    "Conversion": "conversion",
    "ExportError": "errors",
    "Lowering": "functions.lowering",
    "Model": "runtime.model",
    "RequestError": "errors",
    "Scaffold": "samples",
    "Snapshot": "runtime.stream",
    "Stream": "runtime.stream",
    "bench": "benchmark.bench",
    "build": "export",
    "convert": "conversion",
    "diagnose": "doctor",
    "from_edifice": "checkpoints",
    "inspect_model": "inspection",
    "load": "runtime.model",
    "op": "functions.own_op",
    "scaffold": "samples",
    "to_edifice": "checkpoints",
    "verify": "parity",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a command that needs none of it starts at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
