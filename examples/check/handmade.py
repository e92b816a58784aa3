"""A bundle of a module that is written here node by node, of what no example has: tensors of all types, ranks and kinds
of sizes, and a stream of two inputs and two outputs with all kinds of states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edifice_export.bundle.bundle import hash_files, save_model, write_tensor, write_test_data
from edifice_export.bundle.manifest import MANIFEST, MODULE, GraphEntry, Manifest, ProgramEntry, SequenceEntry
from edifice_export.specification import InputSpec, OutputSpec, Size, StateSpec, TensorSpec, Values, shape_of
from edifice_export.values import draw

__all__ = ["write_handmade"]

Arrays = dict[str, np.ndarray]
_Spec = TypeVar("_Spec", bound=TensorSpec)

_SIZES = {"entries": 2, "time": 6, "width": 4, "past": 6}
_TESTED = {"entries": 3, "time": 4, "width": 2, "past": 5}
_FRAMES = 11
"""Of the longer test of the stream, which is of as many entries as _SIZES has."""

_WINDOW_LIMITS: dict[str, tuple[int, int | None]] = {"time": (2, 9), "width": (2, 8)}
_PREFILL_LIMITS: dict[str, tuple[int, int | None]] = {"time": (1, 4)}

_CONSTANTS: dict[str, np.ndarray] = {
    "zero": np.array([0], np.float32),
    "start": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "weight": np.array([[-0.5, -0.25], [0, 0.25], [0.5, 0.75]], np.float32),
    "half": np.array(0.5, np.float32),
    "step": np.array([1], np.int32),
    "last": np.array(-1),
}

_IDS = Values("ids", 5)
_WINDOW_INPUTS = (
    InputSpec("signal", "float32", shape_of("entries", "time", 3)),
    InputSpec("kinds", "int64", shape_of("entries", "time"), _IDS),
    InputSpec("gain", "float16", shape_of("entries", "width")),
    InputSpec("mask", "bool", shape_of("entries", "time"), Values("mask")),
    InputSpec("codes", "int32", shape_of("entries", 3), _IDS),
    InputSpec("level", "int32", (), Values("integers", 9)),
    InputSpec("offset", "float32", shape_of(3)),
)
_WINDOW_OUTPUTS = (
    OutputSpec("sums", "float32", shape_of("entries", "time"), "every"),
    OutputSpec("square", "float16", shape_of("entries", "width")),
    OutputSpec("flags", "bool", shape_of("entries", "time + 1")),
    OutputSpec("total", "float32", ()),
    OutputSpec("count", "int64", ()),
    OutputSpec("counts", "int64", shape_of("entries")),
    OutputSpec("twice", "int32", shape_of("entries", 3)),
)
_WINDOW = """
    moved = Add (signal, offset)
    row = ReduceSum <keepdims = 0> (moved, two)
    kind = Cast <to = 1> (kinds)
    sums = Add (row, kind)
    square = Mul (gain, gain)
    above = Greater (sums, zero)
    seen = And (above, mask)
    first = Slice (mask, start, one, one)
    flags = Concat <axis = 1> (seen, first)
    total = ReduceSum <keepdims = 0> (sums)
    count = ReduceSum <keepdims = 0> (kinds)
    each = ReduceSum <keepdims = 0> (kinds, one)
    long_level = Cast <to = 7> (level)
    counts = Add (each, long_level)
    twice = Add (codes, codes)
"""

_FIXED = (
    StateSpec("0.sum", "float32", shape_of("entries", 2), "stream/initial/0.sum.pb"),
    StateSpec("0.level", "float32", shape_of("entries", 3), 0.5),
    StateSpec("1.seen", "int64", shape_of("entries"), 7),
    StateSpec("1.steps", "int32", shape_of("entries"), 3),
)
_STATES = (*_FIXED, StateSpec("2.kinds", "int64", shape_of("entries", "past"), 0))
_INITIAL = np.array([[0.25, -1.5]], np.float32)
"""Of the state that starts from a file."""

_OWN_INPUTS = (
    InputSpec("signal", "float32", shape_of("entries", 3)),
    InputSpec("kinds", "int64", shape_of("entries"), _IDS),
)
_OWN_OUTPUTS = (
    OutputSpec("score", "float32", shape_of("entries", 2), "last"),
    OutputSpec("seen_so_far", "int64", shape_of("entries"), "last"),
)
_STREAM_INPUTS = (*_OWN_INPUTS, *(state.past for state in _STATES))
_STREAM_OUTPUTS = (*_OWN_OUTPUTS, *(state.present() for state in _STATES))
_STREAM = """
    level = Mul (past__0__level, half)
    present__0__level = Add (level, signal)
    product = MatMul (present__0__level, weight)
    kind = Cast <to = 1> (kinds)
    column = Unsqueeze (kind, one)
    added = Add (product, column)
    sum = Mul (past__0__sum, half)
    score = Add (sum, added)
    present__0__sum = Identity (score)
    present__1__seen = Add (past__1__seen, kinds)
    present__1__steps = Add (past__1__steps, step)
    steps = Cast <to = 7> (present__1__steps)
    seen_so_far = Mul (present__1__seen, steps)
"""
_GROWING = """
    column_of_kinds = Unsqueeze (kinds, one)
    present__2__kinds = Concat <axis = 1> (past__2__kinds, column_of_kinds)
"""
_GROWING_BY_MANY = "present__2__kinds = Concat <axis = 1> (past__2__kinds, kinds)"
"""A Scan's states keep their size."""


def write_handmade(folder: Path, prefill: bool) -> Path:
    """Writes the bundle into a new folder, with or without a prefill graph, and returns that.

    What its test data expect is what ONNX's own evaluator computes.
    """
    sequence = SequenceEntry("stream/test_sequence", _with_frames(_OWN_INPUTS), _with_frames(_OWN_OUTPUTS))
    graphs = {
        "window": _entry("window", _WINDOW_INPUTS, _WINDOW_OUTPUTS, _WINDOW_LIMITS),
        "stream": dataclasses.replace(_entry("stream", _STREAM_INPUTS, _STREAM_OUTPUTS), test_sequence=sequence),
    }
    step = _nodes(_STREAM)
    nodes = {"window": _nodes(_WINDOW), "stream": [*step, *_nodes(_GROWING)]}
    if prefill:
        pieces = (*sequence.inputs, *_STREAM_INPUTS[len(_OWN_INPUTS) :])
        gives = (*_OWN_OUTPUTS, *(state.present(Size(("time",))) for state in _STATES))
        graphs["prefill"] = _entry("prefill", pieces, gives, _PREFILL_LIMITS)
        nodes["prefill"] = [*_over_frames(step), *_nodes(_GROWING_BY_MANY)]
    manifest = Manifest(
        program=ProgramEntry(MODULE, "Handmade"),
        precision="fp32",
        target="portable",
        optimized=True,
        inlined=False,
        opset=20,
        seed=0,
        param_count=6,
        weights={"source": "module", "sha256": "0" * 64},
        versions={"edifice-export": "0"},
        sizes=_SIZES,
        frames="time",
        graphs=graphs,
        states=_STATES,
        reference=None,
        files={},
        parity={"tolerance": 1e-5},
    )
    generator = np.random.default_rng(3)
    for name, entry in graphs.items():
        model = _model(name, nodes[name], manifest)
        save_model(model, folder / entry.model)
        given = {spec.name: draw(spec, _TESTED, generator) for spec in entry.inputs}
        write_test_data(folder / entry.test_data[0], given, _run(ReferenceEvaluator(model), given))
        if entry.test_sequence is not None:
            _write_sequence(folder, entry.test_sequence, ReferenceEvaluator(model), generator)
    write_tensor(folder / str(_STATES[0].initial), _STATES[0].name, _INITIAL)
    manifest = dataclasses.replace(manifest, files=hash_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _entry(
    name: str,
    inputs: tuple[InputSpec, ...],
    outputs: tuple[OutputSpec, ...],
    limits: Mapping[str, tuple[int, int | None]] | None = None,
) -> GraphEntry:
    return GraphEntry(f"{name}/model.onnx", inputs, outputs, (f"{name}/test_data_set_0",), dict(limits or {}))


def _with_frames(specs: Sequence[_Spec]) -> tuple[_Spec, ...]:
    return tuple(dataclasses.replace(each, shape=(each.shape[0], *shape_of("time"), *each.shape[1:])) for each in specs)


def _nodes(text: str) -> list[onnx.NodeProto]:
    """The nodes of a text, in which names can't have a dot."""
    nodes = list(onnx.parser.parse_graph(f"text () => () {{{text}}}").node)
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
    return nodes


def _over_frames(step: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The step of a stream for each of many frames, and what the last one gives."""
    own = [spec.name for spec in _OWN_INPUTS]
    turned, every = [f"{name}.turned" for name in own], [f"{spec.name}.every" for spec in _OWN_OUTPUTS]
    body = helper.make_graph(
        step,
        "step",
        [_value(spec) for spec in (*(state.past for state in _FIXED), *_OWN_INPUTS)],  # a Scan has states first
        [_value(spec) for spec in (*(state.present() for state in _FIXED), *_OWN_OUTPUTS)],
        _constants(step),
    )
    past, present = [state.past.name for state in _FIXED], [state.present().name for state in _FIXED]
    perms = ([1, 0, 2], [1, 0])
    return [
        *(
            helper.make_node("Transpose", [name], [out], perm=perm)
            for name, out, perm in zip(own, turned, perms, strict=True)
        ),
        helper.make_node("Scan", [*past, *turned], [*present, *every], body=body, num_scan_inputs=len(own)),
        *(
            helper.make_node("Gather", [name, "last"], [spec.name])
            for name, spec in zip(every, _OWN_OUTPUTS, strict=True)
        ),
    ]


def _model(name: str, nodes: Sequence[onnx.NodeProto], manifest: Manifest) -> onnx.ModelProto:
    entry = manifest.graphs[name]
    inputs, outputs = ([_value(spec) for spec in specs] for specs in (entry.inputs, entry.outputs))
    graph = helper.make_graph(nodes, name, inputs, outputs, _constants(nodes))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", manifest.opset)], ir_version=10)
    helper.set_model_props(model, manifest.essentials(name))
    onnx.checker.check_model(model, full_check=True)
    return model


def _constants(nodes: Sequence[onnx.NodeProto]) -> list[onnx.TensorProto]:
    used = {name for node in nodes for name in node.input}
    return [numpy_helper.from_array(array, name) for name, array in _CONSTANTS.items() if name in used]


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, dtype, [s if isinstance(s, int) else str(s) for s in spec.shape])


def _run(evaluator: ReferenceEvaluator, given: Mapping[str, np.ndarray]) -> Arrays:
    found = evaluator.run(None, dict(given))
    return {name: np.asarray(value) for name, value in zip(evaluator.output_names, found, strict=True)}


def _write_sequence(
    folder: Path, entry: SequenceEntry, step: ReferenceEvaluator, generator: np.random.Generator
) -> None:
    """Frames of the stream, and what it gives at each after the one before."""
    frames = {spec.name: draw(spec, {**_SIZES, "time": _FRAMES}, generator) for spec in entry.inputs}
    batch = _SIZES["entries"]
    state = {
        each.past.name: np.full(each.of(batch), _INITIAL if isinstance(each.initial, str) else each.initial, each.dtype)
        for each in _STATES
    }
    steps: list[Arrays] = []
    for t in range(_FRAMES):
        steps.append(_run(step, {**state, **{name: array[:, t] for name, array in frames.items()}}))
        state = {each.past.name: steps[-1][each.present().name] for each in _STATES}
    outputs = {spec.name: np.stack([found[spec.name] for found in steps], axis=1) for spec in entry.outputs}
    write_test_data(folder / entry.folder, frames, outputs)
