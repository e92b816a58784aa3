"""Graphs made wrong on purpose, by a bit more than verification may allow: each must be refused.

How wrong a graph is, and float32's own error, are measured here and not taken from verification: in ONNX Runtime
against the float64 reference, and of 256 random roundings of torch's float32 model, others than verification draws.
What is wrong is made smaller or larger until the graph is at some case off by SIZES times what is allowed: the limit,
or twice float32's own error where that is more.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import edifice_export as ee
from edifice_export.bundle.bundle import Bundle, hash_files, open_bundle
from edifice_export.bundle.manifest import MANIFEST
from edifice_export.defaults import TOLERANCE
from edifice_export.programs.reference_model import reference_of
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_export.verification.report import ROUNDING_FACTOR
from edifice_export.verification.rounding import Rounding
from edifice_export.verification.streams import AFTER, BATCH, _Plan
from edifice_export.verification.windows import _sweeps_of

SIZES = 1.2, 1.6
SAMPLES, AT_ONCE, TRIES = 256, 16, 40
FLOATING = (
    "Add",
    "Conv",
    "Div",
    "Exp",
    "Gemm",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "Sigmoid",
    "Softmax",
    "Softplus",
)

Change = Callable[[float], onnx.ModelProto]
"""A model that is wrong, by how much of what is changed."""


@dataclasses.dataclass
class Probe:
    """What is run of one random sequence, and how exact it must be: as verification runs it.

    Attributes:
        kind: window, prefill, or stream.
        lengths: frames up to each output that is compared.
        expected: float64 [batch, lengths, hidden_size].
        allowed: at each length.
        amplified: at each length, whether that is float32's own error.
    """

    kind: str
    frames: np.ndarray
    lengths: list[int]
    expected: np.ndarray
    allowed: np.ndarray
    amplified: np.ndarray

    def run(self, model: ee.Model) -> np.ndarray:
        """What a bundle's graph gives, [batch, lengths, hidden_size]."""
        if self.kind == "window":
            return np.stack([model(self.frames[:, :length]) for length in self.lengths], 1)
        stream = model.stream(len(self.frames))
        if self.kind == "prefill":
            first = [stream.prefill(self.frames[:, : self.lengths[0]])]
            return np.stack(
                [*first, *(stream.step(self.frames[:, t]) for t in range(self.lengths[0], self.lengths[-1]))], 1
            )
        return np.stack([stream.step(self.frames[:, t]) for t in range(self.lengths[-1])], 1)

    def size(self, found: np.ndarray) -> tuple[float, bool]:
        """The largest error in units of what is allowed, and whether rounding is amplified there."""
        sizes = np.nan_to_num(np.abs(found - self.expected), nan=np.inf).max(axis=(0, 2)) / self.allowed
        return float(sizes.max()), bool(self.amplified[sizes.argmax()])


def sabotaged(bundle: Bundle, r: random.Random, folder: Path) -> dict[str, Any]:
    """Makes one graph of a bundle wrong and has it verified: what was changed, how far it is off, if it was refused."""
    copied = folder / "wrong"
    shutil.copytree(bundle.path, copied)
    probes = list(_probes(bundle))
    for _ in range(10):
        graph = r.choice(sorted(bundle.manifest.graphs))
        kind = r.choice(["weight", "constant", "node", "node", "state", "length", "length", "entry"])
        if (kind == "length" and graph != "window") or (kind == "state" and graph == "window"):
            continue
        change, place = KINDS[kind](onnx.load(bundle.file(f"{graph}/model.onnx")), r, probes)
        if change is None:
            continue
        for name in bundle.manifest.graphs:
            shutil.copy(bundle.file(f"{name}/model.onnx"), copied / name)
        reached = _reach(
            change, copied, graph, [probe for probe in probes if (probe.kind == "window") == (graph == "window")]
        )
        if reached is not None:
            size, amplified = reached
            refused = not ee.verify(copied, ["cpu"]).passed
            return {
                "kind": kind,
                "graph": graph,
                "place": place,
                "size": round(size, 3),
                "amplified": amplified,
                "refused": refused,
            }
    return {"kind": "none reached"}


def _probes(bundle: Bundle) -> Iterator[Probe]:
    model = reference_of(bundle)
    if "window" in bundle.manifest.graphs:
        width = int(bundle.manifest.graphs["window"].inputs[0].shape[-1])
        for sweep in _sweeps_of(bundle, model, False)[:2]:
            frames = np.random.default_rng(sweep.seed).standard_normal((sweep.batch, max(sweep.lengths), width))
            yield _probe("window", frames.astype(np.float32), sweep.lengths, *_known(model, "window", frames))
    if "stream" in bundle.manifest.graphs:
        width = int(bundle.manifest.graphs["stream"].inputs[0].shape[-1])
        window = bundle.manifest.window_size
        plan = _Plan.of(window, False)
        frames = np.random.default_rng(1).standard_normal((1, plan.frames, width)).astype(np.float32)
        starts = [length for length in plan.handovers if length <= 3 * window]
        frames = frames[:, : max(3 * window, starts[-1] + AFTER)]
        known = _known(model, "stream", frames)
        yield _probe("stream", frames, list(range(1, 3 * window + 1)), *known)
        for start in starts:
            yield _probe("prefill", frames, [start + t for t in range(AFTER + 1)], *known)
        frames = np.random.default_rng(BATCH).standard_normal((BATCH, plan.batch_frames, width)).astype(np.float32)
        yield _probe("stream", frames, list(range(1, plan.batch_frames + 1)), *_known(model, "stream", frames))


def _probe(kind: str, frames: np.ndarray, lengths: list[int], expected: np.ndarray, own: np.ndarray) -> Probe:
    places = [length - 1 for length in lengths]
    expected, own = expected[:, places], ROUNDING_FACTOR * own[places]
    limit = TOLERANCE * np.maximum(1, np.abs(expected).max(axis=(0, 2)))
    return Probe(kind, frames, lengths, expected, np.maximum(limit, own), own > limit)


def _known(model: Any, kind: str, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference's output at every frame [B, T, D], and float32's own error [T], of few samples if it is small."""
    given = torch.tensor(frames).float()
    expected, own = _compute(copy.deepcopy(model).double(), kind, given.double()), np.zeros(frames.shape[1])
    near = given.repeat(AT_ONCE, 1, 1)
    for index in range(SAMPLES // AT_ONCE):
        with Rounding(10_000 + index):
            found = _compute(model, kind, near)
        error = found.double().unflatten(0, (AT_ONCE, -1)) - expected
        own = np.fmax(own, error.abs().amax(dim=(0, 1, 3)).numpy())
        if own.max() < TOLERANCE / 8:
            break
    return expected.numpy(), own


def _compute(model: Any, kind: str, frames: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.forward_prefixes(frames) if kind == "window" else model.forward_stream(frames)
        return found


def _reach(change: Change, folder: Path, graph: str, probes: list[Probe]) -> tuple[float, bool] | None:
    """Has the bundle hold a graph that is off by SIZES, and says by how much; None if it is not so by any change."""
    low, high, by = 0.0, float("inf"), 1e-5
    for _ in range(TRIES):
        model = change(by)
        (folder / graph / "model.onnx").write_bytes(model.SerializeToString())
        _vouch(folder)
        try:
            loaded = ee.load(folder, threads=1)
            size, amplified = max(probe.size(probe.run(loaded)) for probe in probes)
        except (ee.CheckError, *ORT_ERRORS):
            return None  # not a graph: what was changed were sizes
        if SIZES[0] <= size <= SIZES[1]:
            return size, amplified
        low, high = (by, high) if size < SIZES[0] else (low, by)
        # What is off grows as what is changed does, where it is more than rounding.
        by *= min(1e3, max(1e-3, sum(SIZES) / 2 / size)) if size > 0.1 else 30
        if not low < by < high:
            by = (low * high) ** 0.5 if low else high / 8
        if by > 1e6 or by < 1e-12:
            return None
    return None


def _vouch(folder: Path) -> None:
    bundle = open_bundle(folder, whole=False)
    manifest = dataclasses.replace(bundle.manifest, files=hash_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


# What is changed: each gives the change and says where


def _weight(model: onnx.ModelProto, r: random.Random, _: Any) -> tuple[Change | None, str]:
    """One number of an initializer."""
    tensors = [
        each
        for each in model.graph.initializer
        if each.data_type == TensorProto.FLOAT and numpy_helper.to_array(each).size
    ]
    tensor = r.choice(tensors)
    array = numpy_helper.to_array(tensor).copy()
    place = r.randrange(array.size)

    def change(by: float) -> onnx.ModelProto:
        changed = array.copy()
        changed.flat[place] += np.float32(by) * max(1e-3, np.abs(array).mean())
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        return model

    return change, f"{tensor.name}[{place}]"


def _constant(model: onnx.ModelProto, r: random.Random, _: Any) -> tuple[Change | None, str]:
    """A constant in the body of an op."""
    found = [
        (node, attribute)
        for nodes in _bodies(model)
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name in ("value_float", "value_floats")
        or (attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT)
    ]
    if not found:
        return None, ""
    node, attribute = r.choice(found)
    before = onnx.AttributeProto.FromString(attribute.SerializeToString())

    def change(by: float) -> onnx.ModelProto:
        if attribute.name == "value_float":
            attribute.f = before.f + by * (abs(before.f) or 1)
        elif attribute.name == "value_floats":
            attribute.floats[:] = [value + by * (abs(value) or 1) for value in before.floats]
        else:
            array = numpy_helper.to_array(before.t)
            attribute.t.CopyFrom(
                numpy_helper.from_array((array + by * np.where(array == 0, 1, np.abs(array))).astype(np.float32))
            )
        return model

    return change, node.output[0]


def _node(model: onnx.ModelProto, r: random.Random, _: Any) -> tuple[Change | None, str]:
    """What a node gives, in the graph, in the body of an op, or in a loop's: a decay, a product, a norm."""
    nodes = r.choice([each for each in _bodies(model) if any(node.op_type in FLOATING for node in each)])
    index, node = r.choice([(index, node) for index, node in enumerate(nodes) if node.op_type in FLOATING])
    name, op = node.output[0], node.op_type
    node.output[0] = "right"
    factor = helper.make_node("Constant", [], ["factor"], value_float=1.0)
    copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes[index + 1 :]]
    del nodes[index + 1 :]
    nodes.extend([factor, helper.make_node("Mul", ["right", "factor"], [name]), *copies])
    factor = nodes[index + 1]

    def change(by: float) -> onnx.ModelProto:
        factor.attribute[0].f = 1 + by
        return model

    return change, f"{name} ({op})"


def _state(model: onnx.ModelProto, r: random.Random, _: Any) -> tuple[Change | None, str]:
    """What a graph leaves for the next frames; its output is right."""
    names = [
        out.name
        for out in model.graph.output
        if out.name != "output" and out.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    if not names:
        return None, ""
    name = r.choice(names)
    factor = _instead(model, name, [helper.make_node("Mul", ["right", "by"], [name])])

    def change(by: float) -> onnx.ModelProto:
        factor.attribute[0].f = 1 + by
        return model

    return change, name


def _length(model: onnx.ModelProto, r: random.Random, probes: list[Probe]) -> tuple[Change | None, str]:
    """The output at one length alone: of those that amplify rounding, if there are such."""
    windows = [probe for probe in probes if probe.kind == "window"]
    amplified = [
        length for probe in windows for length, each in zip(probe.lengths, probe.amplified, strict=True) if each
    ]
    length = r.choice(amplified or windows[0].lengths)
    nodes = [
        helper.make_node("Shape", [model.graph.input[0].name], ["frames"], start=1, end=2),
        helper.make_node("Constant", [], ["one_length"], value_ints=[length]),
        helper.make_node("Equal", ["frames", "one_length"], ["is_it"]),
    ]
    return _where(model, nodes), f"{length} frames"


def _entry(model: onnx.ModelProto, *_: Any) -> tuple[Change | None, str]:
    """The output of batches of more than one entry."""
    nodes = [
        helper.make_node("Shape", [model.graph.input[0].name], ["entries"], start=0, end=1),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Greater", ["entries", "one"], ["is_it"]),
    ]
    return _where(model, nodes), "output"


def _where(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Change:
    """The output is off by a number where `is_it`."""
    nodes = [
        *nodes,
        helper.make_node("Cast", ["is_it"], ["there"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["there", "by"], ["off"]),
        helper.make_node("Add", ["right", "off"], ["output"]),
    ]
    number = _instead(model, "output", nodes)

    def change(by: float) -> onnx.ModelProto:
        number.attribute[0].f = by
        return model

    return change


def _instead(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
    """Has nodes that read `right` and `by` give an output; returns the constant `by`."""
    for node in model.graph.node:
        node.output[:] = ["right" if output == name else output for output in node.output]
        node.input[:] = ["right" if output == name else output for output in node.input]
    count = len(model.graph.node)
    model.graph.node.extend([helper.make_node("Constant", [], ["by"], value_float=0.0), *nodes])
    return model.graph.node[count]


def _bodies(model: onnx.ModelProto) -> list[Any]:
    """The nodes of the graph, of each function, and of each graph inside of them."""
    found = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in found:
        found += [attribute.g.node for node in nodes for attribute in node.attribute if attribute.HasField("g")]
    return found


KINDS = {"weight": _weight, "constant": _constant, "node": _node, "state": _state, "length": _length, "entry": _entry}
