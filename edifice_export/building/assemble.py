"""Assemble: from a program to a verified bundle. Every graph is traced, linked, checked, tested and written."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import Bundle, hash_files, save_model, write_tensor, write_test_data
from ..bundle.manifest import MANIFEST, GraphEntry, Manifest, SequenceEntry
from ..errors import CheckError
from ..specification import InputSpec, OutputSpec, Size
from ..values import MAX_MAGNITUDE, first_beyond
from ..verification.report import Report
from ..verification.verify import Progress, Verification
from .settings import Settings

if TYPE_CHECKING:
    import onnx

    from ..programs.program import Program

__all__ = ["write_bundle"]

WEIGHTS = "weights.safetensors"
_PACKAGES = ("edifice-export", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def write_bundle(
    folder: Path,
    program: Program,
    settings: Settings,
    weights: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Writes the verified bundle of a program.

    Args:
        folder: where to, empty; see staging.
        program: what is exported.
        settings: how.
        weights: what the manifest says of where the weights came from.
        progress: called as verification goes on.

    Raises:
        CheckError: the export froze a dimension, ONNX refuses it, or it does not agree with the reference.
    """
    reference = program.reference_weights()
    manifest = Manifest(
        program=program.entry,
        precision=settings.precision,
        target=settings.target,
        optimized=settings.optimize,
        inlined=settings.inline,
        opset=settings.opset,
        seed=settings.seed,
        param_count=program.param_count,
        weights=dict(weights),
        versions={"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        sizes=dict(program.sizes),
        frames=program.frames,
        graphs={},
        states=program.states,
        reference=WEIGHTS if reference is not None else None,
        files={},
        parity={},
    )
    if reference is not None:
        (folder / WEIGHTS).write_bytes(reference)
    for state, value in program.initial_values().items():
        (spec,) = (spec for spec in program.states if spec.name == state)
        write_tensor(folder / str(spec.initial), state, value)
    manifest = _write_graphs(folder, program, manifest, settings.tolerance, progress)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _write_graphs(
    folder: Path, program: Program, manifest: Manifest, tolerance: float, progress: Progress | None
) -> Manifest:
    """Writes and verifies the graphs of a program; returns the manifest with them, all files and what was measured."""
    generator = np.random.default_rng(manifest.seed)
    with Verification(["cpu"], tolerance, manifest.param_count, program=program) as verification:
        for name in program.graphs:
            manifest = _write_graph(folder, program, manifest, name, generator)
            manifest = dataclasses.replace(manifest, files=hash_files(folder, manifest.files))
            if name == "window":
                verification.add(Bundle(folder, manifest), ["window"])
            elif name == program.graphs[-1]:  # a stream is verified with its prefill
                verification.add(Bundle(folder, manifest), ["stream"])
        parity = _parity_of(verification.report(progress), manifest.program.name)
    return dataclasses.replace(manifest, parity=parity)


def _write_graph(
    folder: Path, program: Program, manifest: Manifest, name: str, generator: np.random.Generator
) -> Manifest:
    """Writes a graph and its test data, and returns the manifest with it."""
    from ..graph.trace import outputs_of, trace
    from ..passes import optimize
    from .inline import inline
    from .link import check, link

    inputs, outputs = program.inputs(name), program.outputs(name)
    traced = trace(program.module(name), inputs, outputs, manifest.opset, name, program.traced_sizes(name))
    declared = tuple(output for output in outputs if isinstance(output, OutputSpec))
    _check_sizes(program.entry.name, inputs, outputs_of(traced))
    gives = declared or tuple(_of_stream(spec) if name != "window" else spec for spec in outputs_of(traced))
    test_data = _write_examples(folder, program, name, gives, generator)
    entry = GraphEntry(f"{name}/model.onnx", inputs, gives, test_data, program.limits(name))
    manifest = dataclasses.replace(manifest, graphs={**manifest.graphs, name: entry})
    if name == "stream":
        entry = dataclasses.replace(entry, test_sequence=_write_long_example(folder, program, manifest, generator))
        manifest = dataclasses.replace(manifest, graphs={**manifest.graphs, name: entry})
    if manifest.optimized:
        optimize(traced)
    # Pieces of a stream may be of any length.
    sizes = {symbol: size for symbol, size in manifest.sizes.items() if name == "window" or symbol != manifest.frames}
    linked = link(traced, sizes, manifest.target)
    if manifest.inlined:
        linked = inline(linked)
    _describe(linked, manifest, name)
    save_model(linked, folder / entry.model)
    check(folder / entry.model)
    return manifest


def _check_sizes(module: str, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec]) -> None:
    """Refuses outputs whose sizes depend on the values of inputs."""
    free = {symbol for spec in inputs for symbol in spec.symbols}
    for spec in outputs:
        words = {word for size in spec.shape for word in re.findall(r"[A-Za-z_]\w*", str(size))} - _FUNCTIONS
        if not free.issuperset(words):
            raise CheckError(
                f"{module} gives {spec}, of a size that depends on the values that it is given; give an output whose "
                "sizes follow from those of the inputs, such as all elements and a mask"
            )


_FUNCTIONS = {"Max", "Min", "Mod", "FloorDiv", "floor", "ceiling", "max", "min"}
"""What there may be in a size beside symbols."""


def _of_stream(spec: OutputSpec) -> OutputSpec:
    """What a graph with states gives, which is of the last frame."""
    return spec if spec.name.startswith("present.") else dataclasses.replace(spec, position="last")


def _write_examples(
    folder: Path, program: Program, graph: str, gives: Sequence[OutputSpec], generator: np.random.Generator
) -> tuple[str, ...]:
    paths = []
    for index, (inputs, outputs) in enumerate(program.examples(graph, generator)):
        for spec in gives:
            _check_output(program.entry.name, spec, outputs[spec.name])
        paths.append(f"{graph}/test_data_set_{index}")
        write_test_data(folder / paths[-1], inputs, outputs)
    return tuple(paths)


def _check_output(module: str, spec: OutputSpec, found: np.ndarray) -> None:
    """Refuses what test data can't hold: another type than the graph gives, numbers that no reader takes."""
    if str(found.dtype) != spec.dtype:
        raise CheckError(
            f"{module} gives {spec.name} as {found.dtype}, and torch's exporter makes {spec.dtype} of it; convert it "
            "to that in the module"
        )
    if spec.dtype == "float16":
        raise CheckError(
            f"{module} gives {spec.name} as float16, which is rounded by more than what readers compare to; convert it "
            "to float32 in the module"
        )
    if found.dtype.kind == "f" and (place := first_beyond(found, MAX_MAGNITUDE)) is not None:
        raise CheckError(
            f"{module} gives {found[place]:g} in {spec.name} at {list(place)} of an example; outputs are finite and up "
            f"to {MAX_MAGNITUDE:g}: readers take others for an overflow. Give such places a finite number"
        )


def _write_long_example(
    folder: Path, program: Program, manifest: Manifest, generator: np.random.Generator
) -> SequenceEntry | None:
    found = program.long_example(generator)
    if found is None:
        return None
    path, frames = "stream/test_sequence", Size((str(manifest.frames),))
    write_test_data(folder / path, *found)
    inputs, outputs = manifest.own_tensors("stream")
    return SequenceEntry(
        path,
        tuple(spec.framed(frames) for spec in inputs),
        tuple(spec.framed(frames) for spec in outputs),
    )


def _describe(model: onnx.ModelProto, manifest: Manifest, graph: str) -> None:
    """Lets the model file on its own say what it is."""
    model.producer_name = "edifice-export"
    model.producer_version = manifest.versions["edifice-export"]
    for key, value in manifest.essentials(graph).items():
        model.metadata_props.add(key=key, value=value)


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
        "sizes": report.sizes,
        "amplified": report.amplified,
        "max_abs": report.max_abs,
        "max_rel": report.max_rel,
        "worst": str(report.worst),
        "recurrence_gap": report.recurrence_gap,
    }
