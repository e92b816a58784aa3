"""Passes keep what a graph computes, whatever it is, and make of every model's graphs what they are for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cli_helpers import Capture, done, refused, tiny_build, trace_once
from conftest import TINY, shared_place
from hypothesis import HealthCheck, Phase, given, settings
from lowered import nodes
from random_graphs import LONGEST, RandomGraph, random_graphs, sizes
from reference_cases import make, sequence
from torch.nn import functional

import edifice_export as ee
from edifice_export.building.link import link
from edifice_export.defaults import TARGETS
from edifice_export.graph import trace as tracing
from edifice_export.lowerings import LOWERINGS
from edifice_export.passes import PASSES, optimize
from edifice_export.programs.graphs import entry, signature, state_specs
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_reference.models.config import NUMERICS
from edifice_reference.models.layers import FeedForward, LayerNorm
from edifice_reference.models.registry import ARCHITECTURES

Arrays = dict[str, np.ndarray]
EACH = {rewrite.__name__: rewrite for rewrite in PASSES}
LOOPS_AND_BRANCHES = {"Scan", "Loop", "If"}


@contextmanager
def silence() -> Iterator[None]:
    """Fails if anything is written to standard error, which is where a runtime warns of shapes that are not true."""
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        assert said.read() == b""


class Runs:
    """A model that has passed ONNX's full check, run by ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto, optimized_to: str = "") -> None:
        onnx.checker.check_model(model, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = optimized_to
        with silence():
            self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]

    def __call__(self, feeds: Arrays) -> Arrays:
        return dict(zip(self.names, self.session.run(None, feeds), strict=True))


def assert_agree(found: Arrays, expected: Arrays) -> None:
    """To 1e-5, or 1e-5 of the largest value where that is above 1."""
    assert list(found) == list(expected)
    for name, value in found.items():
        wanted = expected[name]
        assert value.shape == wanted.shape
        error = np.abs(value.astype(np.float64) - wanted).max(initial=0)
        assert error <= 1e-5 * max(1.0, np.abs(wanted).max(initial=0)), name


# What holds of every graph after passes


def assert_tidy(model: ir.Model) -> None:
    """Nothing is unused, names are unique, and nothing is cut to what it is already."""
    graph = model.graph
    names = Counter(node.name for node in graph)
    names.update(f"value {value.name}" for node in graph for value in node.outputs)
    assert max(names.values()) == 1
    assert not {name for name in names if not name or name.startswith("/")}
    for node in graph:
        assert any(value.uses() or value.is_graph_output() for value in node.outputs), node.name
        if node.op_type == "Slice" and re.search(r"/last_\d+$", node.name or ""):
            assert node.inputs[0] is not None
            assert node.inputs[0].shape != node.outputs[0].shape, node.name
    for value in graph.initializers.values():
        assert value.uses() or value.is_graph_output(), value.name


def assert_shapes_are_true(model: ir.Model, feeds: Arrays) -> None:
    """Every declared shape is that of the value, each symbol one number."""
    linked = link(model, {"sequence": LONGEST})
    outputs = {value.name for value in linked.graph.output}
    made = {name for node in linked.graph.node for name in node.output}
    declared = [value for value in linked.graph.value_info if value.name in made - outputs]
    linked.graph.output.extend(declared)
    x = next(iter(feeds.values()))
    symbols: dict[str, int] = {}
    runs = Runs(linked)
    with silence():
        found = runs(feeds)
    for value in linked.graph.output:
        for dim, size in zip(value.type.tensor_type.shape.dim, found[value.name].shape, strict=True):
            if dim.HasField("dim_value"):
                assert dim.dim_value == size, value.name
            else:
                assert symbols.setdefault(dim.dim_param, size) == size, value.name
    expected = {"batch": x.shape[0]} | ({"sequence": x.shape[1]} if x.ndim == 3 else {})
    for name, size in symbols.items():
        if last := re.fullmatch(r"last_(\d+)", name):
            assert size == min(int(last[1]), expected["sequence"])
    assert symbols.items() >= {name: size for name, size in expected.items() if name in symbols}.items()


# Random graphs


def inputs_of_all_sizes() -> list[Arrays]:
    random = np.random.default_rng(1)
    return [
        {"x": random.standard_normal((batch, length, 4)).astype(np.float32)}
        for batch in (1, 2, 5)
        for length in range(1, LONGEST + 1)
    ]


def assert_kept(model: ir.Model, rewrite: Callable[[ir.Model], int | None]) -> None:
    """A pass leaves a graph with the same outputs, and says truly whether it left the graph alone."""
    changed = model.clone()
    count = rewrite(changed)
    assert_tidy(changed)
    if count == 0:
        assert ir.to_proto(changed) == ir.to_proto(model)
        return
    plain, rewritten = Runs(link(model, {"sequence": LONGEST})), Runs(link(changed, {"sequence": LONGEST}))
    with silence():
        for feeds in inputs_of_all_sizes():
            assert_agree(rewritten(feeds), plain(feeds))
    assert_shapes_are_true(changed, inputs_of_all_sizes()[LONGEST + 1])
    assert_shapes_are_true(changed, inputs_of_all_sizes()[-1])


DRAWN = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("name", EACH)
@settings(DRAWN, max_examples=25)
@given(model=random_graphs())
def test_every_pass_keeps_what_a_graph_computes(name: str, model: ir.Model) -> None:
    assert_kept(model, EACH[name])


@settings(DRAWN, max_examples=40)
@given(model=random_graphs())
def test_all_passes_keep_what_a_graph_computes(model: ir.Model) -> None:
    assert_kept(model, optimize)


ALL = float("inf")


def takes_every_axis_for_another(_: Any, node: ir.Node, of: float) -> list[float]:
    return [of, *[ALL] * (len(node.inputs) - 1)]


LAST_FRAMES = importlib.import_module("edifice_export.passes.last_frames")


def declares(op: str, **facts: Any) -> Any:
    """Has an op be declared otherwise."""
    known = LOWERINGS[op]
    declared = dataclasses.replace(known.declared, **facts)
    return mock.patch.dict(LOWERINGS, {op: dataclasses.replace(known, declared=declared)})


def forgets_a_tap() -> Any:
    size = LAST_FRAMES._size_of
    return mock.patch.object(LAST_FRAMES, "_size_of", lambda *of: max(1, size(*of) - 1))


def takes_time_for_another_axis(op: str) -> Any:
    return mock.patch.dict(LAST_FRAMES._RULES, {op: takes_every_axis_for_another})


BROKEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "no kernel": ("conv", lambda: declares("edifice::CausalConv1d", sees=1)),
    "a tap too few": ("conv", forgets_a_tap),
    "means over time": ("binary", lambda: takes_time_for_another_axis("ReduceMean")),
    "softmax over time": ("softmax", lambda: takes_time_for_another_axis("Softmax")),
    "slices of time": ("shift", lambda: takes_time_for_another_axis("Slice")),
    "keys as queries": ("attention", lambda: declares("edifice::CausalAttention", read_out="key")),
    "the state as all outputs": ("conv", lambda: declares("edifice::CausalConv1d", ends_with_state=True)),
}
"""A kind of layer, and what last_frames is made to believe of it."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_caught(name: str) -> None:
    kind, broken = BROKEN[name]

    @settings(DRAWN, max_examples=50, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
    @given(model=random_graphs(kind))
    def keeps(model: ir.Model) -> None:
        assert_kept(model, LAST_FRAMES.last_frames)

    keeps()
    with broken(), pytest.raises((AssertionError, onnx.shape_inference.InferenceError, *ORT_ERRORS)):
        keeps()


def softplus_above(threshold: float) -> ir.Model:
    """Torch's softplus of x with this threshold."""
    made = RandomGraph(lambda _: 0)
    x = made.sequences[0]
    large = made.same("Greater", x, made.constant(threshold))
    y = made.node("Where", [large, x, made.same("Softplus", x)], sizes(x))
    made.graph.outputs.append(made.same("Neg", y))
    return ir.Model(made.graph, ir_version=10)


def test_constants_are_folded_where_they_do_not_grow() -> None:
    made = RandomGraph(lambda _: 0)
    x, one = made.sequences[0], made.weight(1)
    rates = made.same("Exp", made.same("Neg", made.weight(4)))
    four = made.node("Expand", [made.same("Neg", one), made.constant([4], np.int64)], [4])
    y = made.same("Mul", made.same("Add", x, rates), four)
    made.graph.outputs.append(y)
    model = ir.Model(made.graph, ir_version=10)
    plain = Runs(link(model))
    assert EACH["fold_constants"](model) == 3
    assert_tidy(model)
    assert Counter(node.op_type for node in model.graph) == {"Add": 1, "Mul": 1, "Expand": 1}
    feeds = inputs_of_all_sizes()[-1]
    assert_agree(Runs(link(model))(feeds), plain(feeds))


@pytest.mark.parametrize("threshold", [15.0, 16.0, 20.0])
def test_softplus_is_made_whole_where_it_makes_no_difference(threshold: float) -> None:
    model = softplus_above(threshold)
    changed = model.clone()
    assert EACH["whole_softplus"](changed) == (threshold >= 16)
    assert_tidy(changed)
    plain, rewritten = (Runs(link(each)) for each in (model, changed))
    x = np.float32(threshold) * (1 + np.linspace(-1e-6, 1e-6, 4 * 25, dtype=np.float32)).reshape(1, 25, 4)
    for found, expected in zip(rewritten({"x": x}).values(), plain({"x": x}).values(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.1), (1e-6, 0.25), (0.05, 0.05)])
def test_a_clipped_softplus_is_exact_to_rounding(low: float, high: float) -> None:
    made = RandomGraph(lambda _: 0)
    x = made.dense(made.sequences[0], 16)
    y = made.node("Clip", [made.same("Softplus", x), made.constant(low), made.constant(high)], sizes(x))
    made.graph.outputs.extend([made.same("Neg", y), x])
    model = ir.Model(made.graph, ir_version=10)
    assert EACH["fast_softplus"](model) == 1
    assert_tidy(model)
    frames = np.random.default_rng(0).standard_normal((1, 500, 4)).astype(np.float32)
    minus, given_x = Runs(link(model))({"x": 5 * frames}).values()
    exact = np.logaddexp(0, given_x.astype(np.float64)).clip(np.float32(low), np.float32(high))
    # The exponent's own rounding is that of x, which is up to 14.
    np.testing.assert_allclose(-minus, exact, rtol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_fast_softplus_is_exact_to_rounding(scale: float) -> None:
    """Relatively, however small it is."""
    made = RandomGraph(lambda _: 0)
    x = made.dense(made.sequences[0], 16)
    made.graph.outputs.append(made.same("Neg", made.same("Softplus", x)))
    made.graph.outputs.append(x)
    model = ir.Model(made.graph, ir_version=10)
    assert EACH["fast_softplus"](model) == 1
    run = Runs(link(model))
    frames = np.random.default_rng(0).standard_normal((1, 500, 4)).astype(np.float32)
    minus, given_x = run({"x": scale * frames}).values()
    exact = np.logaddexp(0, given_x.astype(np.float64))
    representable = exact > np.finfo(np.float32).tiny
    np.testing.assert_allclose(-minus[representable], exact[representable], rtol=1e-6)
    assert (-minus[~representable] <= np.finfo(np.float32).tiny).all()


# The models' graphs

CASES = [
    *((name, numerics, "window") for name in ARCHITECTURES for numerics in NUMERICS),
    *((name, "standard", graph) for name in ARCHITECTURES for graph in ("stream", "prefill")),
]
WINDOW = TINY["window_size"]


TRACED: dict[tuple[str, str, str], ir.Model] = {}


def traced(name: str, numerics: str, graph: str) -> ir.Model:
    """The plain graph of a model of two layers, not to be changed."""
    return TRACED[name, numerics, graph]


def trace_at_one_size(architecture: str, numerics: str, graph: str) -> ir.Model:
    """That the graph does not depend on the size is for other tests."""
    model = make(ARCHITECTURES[architecture], numerics).float()
    config = model.config
    states = () if graph == "window" else state_specs(model.initial_state(1))
    inputs, outputs = signature(graph, config.embed_dim, config.output_size, states)
    with mock.patch.object(tracing, "check_other_sizes"):
        return tracing.trace(entry(model, graph), inputs, outputs, 20, graph)


def optimized(*case: str) -> ir.Model:
    model = traced(*case).clone()
    optimize(model)
    return model


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Every model and graph in turn, traced once for all processes that test."""
    name, numerics, graph = request.param
    with shared_place(f"{name}-{numerics}-{graph}.onnx", tmp_path_factory) as file:
        if not file.exists():
            ir.save(trace_at_one_size(name, numerics, graph), file)
        TRACED[name, numerics, graph] = ir.load(file)
    return name, numerics, graph


each_window = pytest.mark.parametrize("case", CASES[: 2 * len(ARCHITECTURES) : 2], indirect=True, ids="-".join)


def inputs_of(model: ir.Model, batch: int, length: int) -> Arrays:
    """Random frames, and a state of zeros."""
    random = np.random.default_rng(length)
    symbols = {"batch": batch, "sequence": length}
    first, *states = model.graph.inputs
    feeds = {}
    for value in (first, *states):
        shape = [size if isinstance(size, int) else symbols[str(size)] for size in value.shape or ()]
        made = random.standard_normal(shape) if value is first else np.zeros(shape)
        assert value.dtype is not None
        feeds[str(value.name)] = made.astype(value.dtype.numpy())
    return feeds


def test_passes_keep_what_a_model_computes(case: tuple[str, str, str]) -> None:
    """Each alone and all together; a stream goes on from where it is."""
    model = traced(*case)
    plain = Runs(link(model))
    for rewrite in (*PASSES, optimize):
        changed = model.clone()
        if rewrite(changed) == 0:
            assert ir.to_proto(changed) == ir.to_proto(model)
            continue
        assert_tidy(changed)
        rewritten = Runs(link(changed, {"sequence": WINDOW}))
        lengths = range(1, WINDOW + 1) if case[2] != "stream" else (1, 1)
        with silence():
            for batch in (1, 2, 5):
                state: Arrays = {}
                for length in lengths:
                    feeds = inputs_of(model, batch, length) | state
                    expected = plain(feeds)
                    assert_agree(rewritten(feeds), expected)
                    state = {name.replace("present", "past"): value for name, value in expected.items() if "." in name}


def test_shapes_of_a_models_graph_are_true(case: tuple[str, str, str]) -> None:
    model = optimized(*case)
    for batch, length in ((2, 1), (1, 3), (3, WINDOW)):
        assert_shapes_are_true(model, inputs_of(model, batch, length))


def test_no_transposes_cancel(case: tuple[str, str, str]) -> None:
    """torch's exporter takes them out, and no pass brings them in."""
    for node in optimized(*case).graph:
        before = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        assert before is None or before.op_type != "Transpose", f"{before} is turned again by {node}"


def test_names_still_say_where_nodes_come_from(case: tuple[str, str, str]) -> None:
    for node in optimized(*case).graph:
        assert re.fullmatch(
            r"(blocks\.\d(\.\w+)*|input_projection|final_norm)(/[A-Za-z_]\w*(\.\d)?)+|[a-z]\w*(/\w+)?", node.name or ""
        )


def test_a_target_without_scan_gets_no_loop(case: tuple[str, str, str]) -> None:
    model = optimized(*case)
    linked = {target: link(model, {"sequence": WINDOW} if case[2] == "window" else None, target) for target in TARGETS}
    for target, lowered in linked.items():
        inner = nodes(node for function in lowered.functions for node in function.node)
        found = LOOPS_AND_BRANCHES & {node.op_type for node in inner}
        if TARGETS[target] and case[2] != "stream":
            assert found <= {"If", "Scan"}
            assert "Scan" in found or case[0] != "hymba"
        else:
            assert not found
    for target, alike in (("dml", "cuda"), ("web", "cuda")):
        assert list(linked[target].functions) == list(linked[alike].functions)
    feeds = inputs_of(model, 2, WINDOW)
    assert_agree(Runs(linked["cuda"])(feeds), Runs(linked["portable"])(feeds))


def test_webgpu_can_compute_it(case: tuple[str, str, str]) -> None:
    """Browsers have ten buffers for an operator and no double; a squeezed size that is added is garbage there."""
    model = optimized(*case)
    for node in model.graph:
        if node.op_type == "Add":
            makers = [value.producer() if value is not None else None for value in node.inputs]
            assert all(maker is None or maker.op_type != "Squeeze" for maker in makers), node
    for target in ("portable", "web"):
        linked = link(model, {"sequence": WINDOW} if case[2] == "window" else None, target)
        for node in nodes([*linked.graph.node, *(inner for body in linked.functions for inner in body.node)]):
            if not node.domain and target == "web":
                assert len(node.input) + len(node.output) <= 10, node
            for attribute in node.attribute:
                cast = attribute.i if attribute.name == "to" else attribute.t.data_type
                assert cast != onnx.TensorProto.DOUBLE, node


DENSE = {
    "h3": {
        "sequence": "shift.b diag.b",
        "min(4, sequence)": "shift.c diag.c",
        "1": "out_proj ffn.up ffn.down",
    },
    "hyena": {"sequence": "proj.0 proj.1", "1": "proj.2 out_proj ffn.gate ffn.up ffn.down"},
    "hymba": {
        "sequence": "mamba.in_proj.0 mamba.bc_proj.0 mamba.dt_rank mamba.dt_proj attention.k attention.v",
        "1": "fusion_gate mamba.in_proj.1 mamba.bc_proj.1 mamba.out_proj attention.q attention.out_proj "
        "ffn.up ffn.down",
    },
    "ss_transformer": {
        "sequence": "ssm.in_proj.0 ssm.dt_proj ssm.b_proj ssm.c_proj attention.k attention.v",
        "1": "gate ssm.in_proj.1 ssm.out_proj attention.q attention.out_proj ffn.up ffn.down",
    },
}
"""Dense layers of the last layer, and parts of them, by the frames that they are computed for."""


def frames_of_dense_layers(model: ir.Model, layer: int) -> dict[str, str]:
    """By path in the layer, with the number of the part of one that was split."""
    found = {}
    for node in model.graph:
        match = re.fullmatch(rf"blocks\.{layer}\.([\w.]+)/linear/MatMul(\.\d)?", node.name or "")
        if match:
            assert node.outputs[0].shape is not None
            found[match[1] + (match[2] or "")] = str(node.outputs[0].shape[1])
    return found


@pytest.mark.parametrize("case", [(name, "standard", "window") for name in DENSE], indirect=True, ids="-".join)
def test_the_last_layer_is_computed_for_just_the_frames_that_are_needed(case: tuple[str, str, str]) -> None:
    assert frames_of_dense_layers(optimized(*case), 1) == {
        path: frames for frames, paths in DENSE[case[0]].items() for path in paths.split()
    }


@each_window
def test_the_last_layer_is_computed_for_fewer_frames_than_others(case: tuple[str, str, str]) -> None:
    model = optimized(*case)
    assert "1" in frames_of_dense_layers(model, 1).values()
    assert set(frames_of_dense_layers(model, 0).values()) == {"sequence"}
    # One Slice for whatever is narrowed, and none after a node that gives fewer frames by itself.
    slices = [node for node in model.graph if re.search(r"/last_\d+$", node.name or "")]
    assert len(slices) <= 3
    for node in slices:
        assert node.inputs[0] is not None
        assert "sequence" in map(str, node.inputs[0].shape or ()) or "CausalConv1d" in str(node.inputs[0].producer())


@each_window
def test_a_plain_window_has_none_of_that(case: tuple[str, str, str]) -> None:
    model = traced(*case)
    for node in model.graph:
        for value in node.outputs:
            shape = [str(size) for size in value.shape or ()]
            assert not any(size.startswith("min(") for size in shape)
            assert len(shape) < 3 or shape[1] != "1"


@pytest.mark.parametrize("case", [("h3", "standard", "window")], indirect=True, ids="-".join)
def test_no_loop_is_left_in_h3(case: tuple[str, str, str]) -> None:
    model = optimized(*case)
    linked = link(model, {"sequence": WINDOW})
    assert not {"Scan", "Loop"} & {node.op_type for node in nodes(f for g in linked.functions for f in g.node)}
    chosen = [
        entry.value for node in linked.graph.node for entry in node.metadata_props if entry.key.endswith("lowering")
    ]
    assert [name for name in chosen if name in ("masked", "direct")] == ["direct", "direct"]


@each_window
def test_what_a_runtime_fuses_is_still_fused(case: tuple[str, str, str], tmp_path: Path) -> None:
    counts: list[Counter[str]] = []
    for model in (traced(*case), optimized(*case)):
        path = tmp_path / f"{len(counts)}.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        ort.InferenceSession(
            link(model, {"sequence": WINDOW}).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        counts.append(Counter(node.op_type for node in onnx.load(path).graph.node))
    plain, found = counts
    model = make(ARCHITECTURES[case[0]], case[1])
    with mock.patch.object(functional, "silu", wraps=functional.silu) as silu:
        model(sequence(1, WINDOW))
    kinds = Counter(type(module) for module in model.modules())
    # Nothing of a norm is left in parts.
    assert found["LayerNormalization"] + found["SkipLayerNormalization"] == kinds[LayerNorm]
    for fused in ("BiasGelu", "QuickGelu"):
        assert found[fused] == plain[fused]
    assert found["BiasGelu"] == kinds[FeedForward]
    assert found["QuickGelu"] == silu.call_count
    assert found["Gelu"] == plain["Gelu"]


# Bundles


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_builds_and_verifies(
    capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trace_once(monkeypatch)
    done(capfd, *tiny_build("hymba", "--graph=window", f"--target={target}"))
    bundle = ee.load("bot").bundle
    assert (bundle.manifest.target, bundle.manifest.optimized) == (target, True)
    assert bundle.manifest.parity["max_abs"] < 1e-5
    model = onnx.load(bundle.file("window/model.onnx"))
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert (said["edifice.target"], said["edifice.optimized"]) == (target, "true")
    inner = {node.op_type for node in nodes(node for function in model.functions for node in function.node)}
    assert LOOPS_AND_BRANCHES & inner == {"portable": {"Scan"}, "cpu": {"If", "Scan"}}.get(target, set())

    (first,) = (entry for entry in explained(capfd, "bot") if entry["node"] == "blocks.0.mamba/selective_scan")
    lowering, why = ("plain", f"{WINDOW} frames, at most") if TARGETS[target] else ("blocked", target)
    assert first["op"] == "SelectiveScan"
    assert first["lowering"] == lowering
    assert first["body"] == f"SelectiveScan_{lowering}_6to1"
    assert why in first["why"]


def explained(capfd: Capture, *arguments: str) -> list[dict[str, str]]:
    """What inspect says of each op, the same as text and as JSON."""
    printed = json.loads(done(capfd, "inspect", *arguments, "--explain", "--json").out)
    text = done(capfd, "inspect", *arguments, "--explain").words
    found: list[dict[str, str]] = printed["lowerings"]
    assert all(" ".join(each.values()) in text for each in found)
    assert "lowerings" not in json.loads(done(capfd, "inspect", *arguments, "--json").out)
    assert found[0]["why"] not in done(capfd, "inspect", *arguments).out
    return found


def test_a_plain_bundle_is_plain_and_verified(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace_once(monkeypatch)
    done(capfd, *tiny_build("hymba", "--graph=window", "--no-optimize"))
    bundle = ee.load("bot").bundle
    assert (bundle.manifest.target, bundle.manifest.optimized) == ("portable", False)
    model = onnx.load(bundle.file("window/model.onnx"))
    assert {entry.key: entry.value for entry in model.metadata_props}["edifice.optimized"] == "false"
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Where"] == operators["Softplus"] == TINY["num_layers"]
    assert not any("/last_" in node.name for node in model.graph.node)
    assert ee.verify(bundle).passed
    # All frames are read out in both layers, and in no layer only the last one.
    scans = [entry["lowering"] for entry in explained(capfd, "bot") if entry["op"] == "SelectiveScan"]
    assert scans == ["plain"] * TINY["num_layers"]


def test_explain_follows_the_graph(capfd: Capture, any_bundle: ee.Bundle) -> None:
    """Every edifice op is there, in the graph's order, of whichever graph."""
    for graph in any_bundle.manifest.graphs:
        model = onnx.load(any_bundle.file(any_bundle.manifest.graphs[graph].model))
        called = [(node.name, node.op_type) for node in model.graph.node if node.domain == "edifice"]
        found = explained(capfd, str(any_bundle.path), f"--graph={graph}")
        assert [(entry["node"], entry["body"]) for entry in found] == called
        assert all(entry["body"].startswith(f"{entry['op']}_{entry['lowering']}_") for entry in found)
        if graph == "stream":
            assert {entry["lowering"] for entry in found if entry["op"] == "SelectiveScan"} == {"frame"}


def test_an_unknown_target_is_refused(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capfd, *tiny_build("hymba", "--target=tpu"))
    assert "--target" in message
    assert "tpu" in message
    assert all(target in message for target in TARGETS)
    with pytest.raises(ee.RequestError, match="target must be portable, cpu, cuda, dml, web, got 'tpu'"):
        ee.build("hymba", output="bot", target="tpu", **TINY)
    assert list(tmp_path.iterdir()) == []
