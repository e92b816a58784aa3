"""Build: the whole road, from an architecture's name to a verified bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import NUMERICS, OptionError
from edifice_reference.models.registry import Architecture, get_architecture

from ..arguments import whole_number
from ..bundle.bundle import Bundle, hash_files, open_bundle, save_model
from ..bundle.manifest import GRAPHS, MANIFEST, Manifest
from ..bundle.staging import staging
from ..defaults import DEFAULT_OPSET, OPSETS, TARGETS, TOLERANCE
from ..errors import CheckError, RequestError
from ..machine import require_torch, small_model_threads
from ..verification.report import Report
from ..verification.verify import Progress, Verification, recurrence_gap
from .test_data import write_all_test_data

if TYPE_CHECKING:
    import onnx
    from torch import nn

__all__ = ["build"]

BUILDS = {"window": GRAPHS[:1], "stream": GRAPHS[1:], "both": GRAPHS}
"""The graphs that each value of `graph` asks for."""

WEIGHTS = "weights.safetensors"
_PACKAGES = ("edifice-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def build(
    architecture: str,
    *,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    numerics: str | None = None,
    graph: str = "both",
    target: str = "portable",
    optimize: bool = True,
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
        weights: a weights file of any format that checkpoints.read_checkpoint reads; fresh weights if None.
        numerics: `standard` or `edifice`; if None, that of the weights' origin, standard for fresh ones.
        graph: `window`, for a whole window at once; `stream`, for one frame at a time with a state (and `prefill`, for
            several); or `both`.
        target: what the graphs are made fast for, one of defaults.TARGETS; they are right everywhere.
        optimize: whether to apply the graph passes; the plain graph is for debugging.
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
    try:
        return _build(
            get_architecture(architecture),
            Path(output) if output is not None else Path("exported") / architecture,
            Path(weights) if weights is not None else None,
            numerics,
            graph,
            target,
            optimize,
            opset,
            seed,
            tolerance,
            progress,
            options,
        )
    except OptionError as error:
        raise RequestError(str(error)) from error


def _build(
    architecture: Architecture,
    output: Path,
    weights: Path | None,
    numerics: str | None,
    graph: str,
    target: str,
    optimize: bool,
    opset: int,
    seed: int,
    tolerance: float,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> Bundle:
    require_torch()
    from ..programs.reference_model import make_reference
    from ..weights import configure, read_checkpoint

    if graph not in BUILDS:
        raise RequestError(f"graph must be {', '.join(BUILDS)}, got {graph!r}")
    if target not in TARGETS:
        raise RequestError(f"target must be {', '.join(TARGETS)}, got {target!r}")
    opset = whole_number("opset", opset, OPSETS[0], OPSETS[-1])
    seed = whole_number("seed", seed, 0, 2**63 - 1)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < float("inf"):
        raise RequestError(f"tolerance must be a positive number, got {tolerance!r}")
    checkpoint = read_checkpoint(weights) if weights is not None else None
    config = configure(architecture, checkpoint, options, stream="stream" in BUILDS[graph])
    numerics = numerics or (checkpoint.numerics if checkpoint is not None else "standard")
    if numerics not in NUMERICS:
        raise RequestError(f"numerics must be {' or '.join(NUMERICS)}, got {numerics!r}")
    origin = _origin(weights)
    with staging(output) as folder, small_model_threads(config.param_count):
        model = make_reference(architecture, config, numerics, seed, checkpoint)
        wanted = BUILDS[graph]
        if "stream" in wanted:
            _check_stream(model, graph)
        states, entries = write_all_test_data(folder, model, wanted, seed)
        manifest = Manifest(
            architecture=architecture.name,
            options=config.options(),
            numerics=numerics,
            precision="fp32",
            target=target,
            optimized=optimize,
            opset=opset,
            seed=seed,
            param_count=sum(parameter.numel() for parameter in model.parameters()),
            weights=origin,
            versions={"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
            graphs=entries,
            states=states,
            reference=WEIGHTS,
            files={},
            parity={},
        )
        _write_weights(folder / WEIGHTS, model, manifest)
        _write_manifest(folder, _write_graphs(folder, model, manifest, float(tolerance), progress))
        bundle = open_bundle(folder)
    return dataclasses.replace(bundle, path=output)


def _check_stream(model: Any, graph: str) -> None:
    """Refuses a stream of a model that has none, and says what one with an exact recurrence would change."""
    if model.why_no_stream is None:
        return
    gap = recurrence_gap(model.double(), model.config.window_size)
    raise RequestError(
        f"--graph {graph}: {model.why_no_stream}. Ask for --graph window; or for --numerics standard, the exact "
        f"recurrence, which on these weights would change the output by up to {gap:.1e} within the window"
    )


def _write_graphs(
    folder: Path, model: nn.Module, manifest: Manifest, tolerance: float, progress: Progress | None
) -> Manifest:
    """Writes and verifies the graphs of a manifest; returns it with all files and the parity that was measured."""
    with Verification(["cpu"], tolerance, manifest.param_count) as verification:
        for name in manifest.graphs:
            _write_graph(folder, model, manifest, name)
            manifest = dataclasses.replace(manifest, files=hash_files(folder, manifest.files))
            if name != "stream":  # which is verified with its prefill
                verification.add(Bundle(folder, manifest), ["window" if name == "window" else "stream"])
        parity = _parity_of(verification.report(progress), manifest.architecture)
    return dataclasses.replace(manifest, parity=parity)


def _write_graph(folder: Path, model: nn.Module, manifest: Manifest, name: str) -> None:
    from ..graph.trace import trace
    from ..passes import optimize
    from ..programs.graphs import entry
    from .link import check, link

    graph = manifest.graphs[name]
    traced = trace(entry(model, name), graph.inputs, graph.outputs, manifest.opset, name)
    if manifest.optimized:
        optimize(traced)
    length = manifest.window_size if name == "window" else None
    linked = link(traced, length, manifest.target)
    _describe(linked, manifest, name)
    save_model(linked, folder / graph.model)
    check(folder / graph.model)


def _origin(weights: Path | None) -> dict[str, Any]:
    if weights is None:
        return {"source": "fresh"}
    with weights.open("rb") as file:
        return {"source": weights.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _describe(model: onnx.ModelProto, manifest: Manifest, graph: str) -> None:
    """Lets the model file on its own say what it is."""
    model.producer_name = "edifice-export"
    model.producer_version = manifest.versions["edifice-export"]
    for key, value in manifest.essentials(graph).items():
        model.metadata_props.add(key=key, value=value)


def _write_weights(path: Path, model: nn.Module, manifest: Manifest) -> None:
    from ..weights import encode_safetensors, own_metadata

    metadata = own_metadata(manifest.architecture, manifest.options, manifest.numerics)
    path.write_bytes(encode_safetensors(dict(model.named_parameters()), metadata))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _parity_of(report: Report, name: str) -> dict[str, Any]:
    """What a manifest says of a verification that was passed."""
    if not report.passed:
        raise CheckError(f"{name} was not written: {report.summary()}")
    return {
        "tolerance": report.tolerance,
        "reference": report.reference,
        "providers": report.providers,
        "cases": len(report.cases),
        "prefixes": report.prefixes,
        "frames": report.frames,
        "histories": report.histories,
        "amplified": report.amplified,
        "max_abs": report.max_abs,
        "max_rel": report.max_rel,
        "worst": str(report.worst),
        "recurrence_gap": report.recurrence_gap,
    }
