"""Export: the whole road, from somebody's torch module to a verified bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import callback, path_of
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.staging import staging
from ..defaults import DEFAULT_OPSET, PRECISIONS, TOLERANCE
from ..machine import require_torch, small_model_threads
from ..specification import Values
from ..verification.verify import Progress
from .assemble import write_bundle
from .settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from ..programs.source import Source

__all__ = ["export", "export_source"]


def export(
    module: nn.Module,
    args: Sequence[Any],
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    values: Mapping[str, Values] | None = None,
    output: str | Path | None = None,
    target: str = "portable",
    precision: str = PRECISIONS[0],
    optimize: bool = True,
    inline: bool = False,
    opset: int = DEFAULT_OPSET,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a torch module to a verified bundle. What it is given is named as torch.onnx.export names it.

    The module is not changed: a private copy on the CPU, in inference mode, is traced, and run in float64 to compare
    the graph with, at sizes that were never traced. A module in half precision is exported in float32.

    Args:
        module: its forward computes what is exported.
        args: example inputs in forward's order, tensors.
        dynamic_shapes, input_names, output_names, values: see Source.
        output: the folder to write; exported/<the module's class> if None. A whole bundle there is replaced.
        target, precision, optimize, inline, opset, seed, tolerance: see building.settings.Settings, and build.
        progress: called as verification goes on.

    Returns:
        The bundle as written.

    Raises:
        RequestError: the request can't be met: an argument, a size, the output folder.
        CheckError: a free size was frozen (the error names the file and line), ONNX refuses the graph, or it does not
            agree with the module. Nothing is written then.
    """
    require_torch()
    from ..programs.source import Source

    settings = Settings(target, optimize, inline, opset, seed, tolerance, precision)
    if output is not None:
        output = path_of("output", output)
    progress = callback("progress", progress)
    values = values if values is not None else {}
    source = Source(module, args, dynamic_shapes, input_names, output_names, values)
    return export_source(source, output, settings, progress)


def export_source(
    source: Source, output: str | Path | None, settings: Settings, progress: Progress | None = None
) -> Bundle:
    """The same of a source: see export."""
    require_torch()
    from ..programs.module_program import ModuleProgram
    from ..programs.private_copy import unwrapped

    place = Path(output) if output is not None else Path("exported") / type(unwrapped(source.module)).__name__
    with staging(place) as folder:
        program = ModuleProgram(source)
        with small_model_threads(program.param_count):
            origin = {"source": "module", "sha256": program.fingerprint}
            write_bundle(folder, program, settings, origin, progress)
        bundle = open_bundle(folder)
    return dataclasses.replace(bundle, path=place)
