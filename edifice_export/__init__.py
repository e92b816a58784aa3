"""From state-space, long-convolution and hybrid sequence models to verified ONNX bundles, and running those.

import edifice_export as ee

bundle = ee.build("hymba", weights="bot.safetensors", output="exported/bot")
bundle = ee.export(module, args, dynamic_shapes={"x": {0: "batch", 1: "time"}}, output="exported/mine")
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
    from .building.build import build
    from .building.export import export
    from .bundle.bundle import Bundle
    from .errors import CheckError, ExportError, RequestError
    from .inspection.inspect import inspect_model
    from .lowerings.lowering import Call, Lowering
    from .lowerings.own_op import op
    from .programs.source import Source
    from .runtime.doctor import diagnose
    from .runtime.model import Model, load
    from .runtime.stream import Snapshot, Stream
    from .scaffolding.scaffold import Scaffold, scaffold
    from .specification import Values
    from .standing_in.context import standins
    from .verification.verify import verify
    from .weights import from_edifice, to_edifice
    from .weights.convert import Conversion, convert

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
    "Source",
    "Stream",
    "Values",
    "bench",
    "build",
    "convert",
    "diagnose",
    "export",
    "from_edifice",
    "inspect_model",
    "load",
    "op",
    "scaffold",
    "standins",
    "to_edifice",
    "verify",
]

_HOMES = {
    "BenchReport": "benchmark.results",
    "BenchResult": "benchmark.results",
    "Bundle": "bundle.bundle",
    "Call": "lowerings.lowering",
    "CheckError": "errors",
    "Conversion": "weights.convert",
    "ExportError": "errors",
    "Lowering": "lowerings.lowering",
    "Model": "runtime.model",
    "RequestError": "errors",
    "Scaffold": "scaffolding.scaffold",
    "Snapshot": "runtime.stream",
    "Source": "programs.source",
    "Stream": "runtime.stream",
    "Values": "specification",
    "bench": "benchmark.bench",
    "build": "building.build",
    "export": "building.export",
    "convert": "weights.convert",
    "diagnose": "runtime.doctor",
    "from_edifice": "weights",
    "inspect_model": "inspection.inspect",
    "load": "runtime.model",
    "op": "lowerings.own_op",
    "scaffold": "scaffolding.scaffold",
    "standins": "standing_in.context",
    "to_edifice": "weights",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a command that needs none of it starts at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
