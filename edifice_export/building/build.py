"""Build: the whole road, from an architecture's name to a verified bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import NUMERICS, OptionError
from edifice_reference.models.registry import get_architecture

from ..arguments import callback, path_of, text
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import GRAPHS
from ..bundle.staging import staging
from ..defaults import DEFAULT_OPSET, PRECISIONS, TOLERANCE
from ..errors import RequestError
from ..machine import require_torch, small_model_threads
from ..verification.verify import Progress, recurrence_gap
from .assemble import write_bundle
from .settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from edifice_reference.models.contract import ReferenceModel

__all__ = ["build"]

BUILDS = {"window": GRAPHS[:1], "stream": GRAPHS[1:], "both": GRAPHS}
"""The graphs that each value of `graph` asks for."""


def build(
    architecture: str,
    *,
    output: str | Path | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    numerics: str | None = None,
    graph: str = "both",
    target: str = "portable",
    precision: str = PRECISIONS[0],
    optimize: bool = True,
    inline: bool = False,
    opset: int = DEFAULT_OPSET,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Builds a verified bundle: traces the reference model, links its ops, compares with the reference, and writes.

    Args:
        architecture: its name, such as `hymba`.
        output: the folder to write; exported/<architecture> if None. A whole bundle there is replaced, see
            staging.
        weights: a file or folder that weights.read_checkpoint reads, or a `state_dict()`; fresh weights if None.
        numerics: `standard` or `edifice`; if None, that of the weights' origin, standard for fresh ones.
        graph: `window`, for a whole window at once; `stream`, for one frame at a time with a state (and `prefill`, for
            several); or `both`.
        target: what the graphs are made fast for, one of defaults.TARGETS; they are right everywhere.
        precision: the type that the graphs compute in, one of defaults.PRECISIONS.
        optimize: whether to apply the graph passes; the plain graph is for debugging.
        inline: whether to make plain graphs without functions, see building.settings.Settings.
        opset: version of the ONNX operator set.
        seed: for fresh weights and for the test data.
        tolerance: largest error allowed, see defaults.TOLERANCE.
        progress: called as verification goes on.
        **options: the architecture's options; those that a weights file tells need not be given.

    Returns:
        The bundle as written.

    Raises:
        RequestError: the request can't be met: an option, the weights, the output folder.
        CheckError: the export froze a dimension, ONNX refuses it, or it does not agree with the reference. Nothing is
            written then.
    """
    _check_architecture(architecture)
    settings = Settings(target, optimize, inline, opset, seed, tolerance, precision)
    text("graph", graph, BUILDS)
    if numerics is not None:
        text("numerics", numerics, NUMERICS)
    if isinstance(weights, (str, os.PathLike)):
        weights = path_of("weights", weights)
    elif weights is not None and not isinstance(weights, Mapping):
        raise RequestError(f"weights must be a path, or a state_dict() with tensors by name, got {weights!r:.80}")
    place = path_of("output", output) if output is not None else Path("exported") / architecture
    progress = callback("progress", progress)
    require_torch()
    from ..programs.architecture import ArchitectureProgram
    from ..programs.reference_model import make_reference
    from ..weights import configure, read_checkpoint

    with _options_refused():
        known = get_architecture(architecture)
        checkpoint = read_checkpoint(weights) if weights is not None else None
        config = configure(known, checkpoint, options, stream="stream" in BUILDS[graph])
        numerics = numerics or (checkpoint.numerics if checkpoint is not None else "standard")
        origin = checkpoint.entry() if checkpoint is not None else {"source": "fresh"}
        with staging(place) as folder, small_model_threads(config.param_count):
            model = make_reference(known, config, numerics, settings.seed, checkpoint)
            if "stream" in BUILDS[graph]:
                _check_stream(model, graph)
            write_bundle(folder, ArchitectureProgram(architecture, model, BUILDS[graph]), settings, origin, progress)
            bundle = open_bundle(folder)
        return dataclasses.replace(bundle, path=place)


def _check_architecture(architecture: object) -> None:
    """Refuses what is no name, and says what takes a module."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(architecture, torch.nn.Module):
        raise RequestError(
            f"architecture must be a name, such as hymba, got a {type(architecture).__name__}: export takes modules, "
            "edifice_export.export(module, args, dynamic_shapes=...); or give a known model's state_dict() as weights"
        )
    text("architecture", architecture)


@contextlib.contextmanager
def _options_refused() -> Iterator[None]:
    """Has the library's errors be this package's."""
    try:
        yield
    except OptionError as error:
        raise RequestError(str(error)) from error


def _check_stream(model: ReferenceModel, graph: str) -> None:
    """Refuses a stream of a model that has none, and says what one with an exact recurrence would change."""
    if model.why_no_stream is None:
        return
    gap = recurrence_gap(model.double(), model.config.window_size)
    raise RequestError(
        f"--graph {graph}: {model.why_no_stream}. Ask for --graph window; or for --numerics standard, the exact "
        f"recurrence, which on these weights would change the output by up to {gap:.1e} within the window"
    )
