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
from ..errors import CheckError, RequestError
from ..specification import PAST, InputSpec, OutputSpec, Size
from ..values import MAX_MAGNITUDE, first_beyond
from ..verification.report import Report
from ..verification.verify import PARTS, Progress, Verification
from ..weights.formats.safetensors import write_safetensors
from .settings import Settings
from .weight_file import SHARED_FROM, WeightFile

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
    metadata = program.reference_metadata()
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
        reference=WEIGHTS if metadata is not None else None,
        files={},
        parity={},
    )
    for state, value in program.initial_values().items():
        (spec,) = (spec for spec in program.states if spec.name == state)
        write_tensor(folder / str(spec.initial), state, value)
    with Verification(["cpu"], settings.tolerance, manifest.param_count, program=program) as verification:
        write = _write_apart if settings.single_file or 4 * manifest.param_count < SHARED_FROM else _write_together
        manifest = write(folder, program, manifest, verification)
        parity = _parity_of(verification.report(progress), manifest.program.name)
    manifest = dataclasses.replace(manifest, parity=parity)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _write_apart(folder: Path, program: Program, manifest: Manifest, verification: Verification) -> Manifest:
    """Writes graphs with their weights inside, and verifies each while the next is traced; returns the manifest."""
    metadata, generator = program.reference_metadata(), np.random.default_rng(manifest.seed)
    if metadata is not None:
        write_safetensors(folder / WEIGHTS, program.parameters(), metadata)
    for name in program.graphs:
        entry, model = _make_graph(folder, program, manifest, name, generator)
        manifest = _with(manifest, name, dataclasses.replace(entry, model=f"{name}/model.onnx"))
        _check_inside(model)
        _save(folder, manifest, name, model)
        manifest = dataclasses.replace(manifest, files=hash_files(folder, manifest.files))
        if name == "window" or name == program.graphs[-1]:  # a stream is verified with its prefill
            verification.add(Bundle(folder, manifest), ["window" if name == "window" else "stream"])
    return manifest


def _write_together(folder: Path, program: Program, manifest: Manifest, verification: Verification) -> Manifest:
    """Writes graphs that share a file of weights, where each number is once, and verifies them; returns the manifest.

    ONNX Runtime reads weights from the model's own folder alone, so all are in one.
    """
    metadata, generator = program.reference_metadata(), np.random.default_rng(manifest.seed)
    weights = WeightFile(program.parameters(), whole=metadata is not None)
    models = {}
    for name in program.graphs:
        entry, models[name] = _make_graph(folder, program, manifest, name, generator)
        manifest = _with(manifest, name, dataclasses.replace(entry, model=f"{name}.onnx", weights=WEIGHTS))
        weights.strip(models[name])
    weights.write(folder / WEIGHTS, metadata or {})
    for name, model in models.items():
        weights.point(model, WEIGHTS)
        _save(folder, manifest, name, model)
    manifest = dataclasses.replace(manifest, files=hash_files(folder))
    verification.add(Bundle(folder, manifest), [part for part in PARTS if part in manifest.graphs])
    return manifest


def _with(manifest: Manifest, name: str, entry: GraphEntry) -> Manifest:
    return dataclasses.replace(manifest, graphs={**manifest.graphs, name: entry})


def _check_inside(model: onnx.ModelProto) -> None:
    """Refuses weights that no model can have inside."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > _MAX_INSIDE:
        raise RequestError(
            f"--single-file: a graph has {size / 2**30:.1f} GiB of weights, and ONNX files end at 2; leave it out"
        )


_MAX_INSIDE = 2**31 - 2**24


def _save(folder: Path, manifest: Manifest, name: str, model: onnx.ModelProto) -> None:
    from .link import check

    _describe(model, manifest, name)
    path = folder / manifest.graphs[name].model
    save_model(model, path)
    check(path)


def _make_graph(
    folder: Path, program: Program, manifest: Manifest, name: str, generator: np.random.Generator
) -> tuple[GraphEntry, onnx.ModelProto]:
    """Makes a graph and writes its test data; the entry doesn't say yet where the model is."""
    from ..graph.trace import outputs_of, trace
    from ..passes import optimize
    from .inline import inline
    from .link import link

    inputs, outputs = program.inputs(name), program.outputs(name)
    traced = trace(program.module(name), inputs, outputs, manifest.opset, name, program.traced_sizes(name))
    declared = tuple(output for output in outputs if isinstance(output, OutputSpec))
    _check_sizes(program.entry.name, inputs, outputs_of(traced))
    gives = declared or tuple(_of_stream(spec) if name != "window" else spec for spec in outputs_of(traced))
    _check_states(program.entry.name, manifest.carried(name)[1], gives)
    test_data = _write_examples(folder, program, name, gives, generator)
    entry = GraphEntry("", inputs, gives, test_data, program.limits(name))
    if name == "stream":
        described = _with(manifest, name, entry)
        entry = dataclasses.replace(entry, test_sequence=_write_long_example(folder, program, described, generator))
    if manifest.optimized:
        optimize(traced)
    # Pieces of a stream may be of any length, and come after as many frames.
    open_ended = () if name == "window" else (manifest.frames, str(PAST))
    sizes = {symbol: size for symbol, size in manifest.sizes.items() if symbol not in open_ended}
    linked = link(traced, sizes, manifest.target)
    return entry, inline(linked) if manifest.inlined else linked


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


def _check_states(module: str, wanted: Sequence[OutputSpec], gives: Sequence[OutputSpec]) -> None:
    """Refuses states that a graph does not leave as the next frame takes them."""
    for spec, found in zip(wanted, gives[len(gives) - len(wanted) :], strict=True):
        if str(spec) != str(found):
            raise CheckError(
                f"{module} should give {spec}, and in the graph it is {found}: a size that should stay free was "
                "frozen, or the state grows by another number than that of frames"
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
