"""Link: a body for every node, of its own where nodes differ, without what is not read, and with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from lowered import nodes as all_nodes
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.building.link import link
from edifice_export.bundle.body_names import body_name, op_of
from edifice_export.bundle.manifest import GRAPHS, LOWERING, REASON
from edifice_export.errors import CheckError
from edifice_export.graph.trace import trace
from edifice_export.lowerings import LOWERINGS
from edifice_export.lowerings.linear_scan import MASKED
from edifice_export.lowerings.lowering import Call, Op
from edifice_export.specification import InputSpec, TensorSpec, shape_of
from edifice_reference import ops

X = InputSpec("x", "float32", shape_of("batch", "sequence", 4))


def traced(module: nn.Module, *shapes: tuple[int | str, ...]) -> ir.Model:
    """An abstract graph from x to outputs of these shapes."""
    outputs = [TensorSpec(f"y{index}", "float32", shape_of(*shape)) for index, shape in enumerate(shapes)]
    return trace(module, [X], outputs, 20)


def made_for(frames: int | None) -> dict[str, int]:
    """What free sizes are made for: so many frames, or any number of them."""
    return {"batch": 1} | ({} if frames is None else {"sequence": frames})


def bodies(model: onnx.ModelProto, op: str) -> list[str]:
    """The names of an op's bodies, in the graph's order."""
    return [body.name for body in model.functions if op_of(body.name) == op]


def said(model: onnx.ModelProto) -> list[dict[str, str]]:
    """The metadata of each edifice node."""
    return [{each.key: each.value for each in node.metadata_props} for node in model.graph.node if node.domain]


def assert_right(model: onnx.ModelProto, module: nn.Module) -> None:
    """At several sizes, against the module itself."""
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (2, 7), (3, 70), (1, 300)):
        x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5 * scale)


class Scans(nn.Module):
    """Linear scans that share a decay: with and without an initial state, of which one output or both are read."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.ones(1, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay = -x[..., :1].abs()
        x, _ = ops.linear_scan(x, decay)
        x, _ = ops.linear_scan(x / 2, decay, self.initial)
        x, state = ops.linear_scan(x / 2, decay)
        x, _ = ops.linear_scan(x / 2, decay * torch.ones(4))
        return x, state


def test_nodes_of_one_op_may_have_different_bodies() -> None:
    module = Scans()
    model = traced(module, X.shape, ("batch", 4))
    for length, target, name in (
        (None, "portable", "chunked"),
        (MASKED, "portable", "either"),
        (MASKED, "dml", "masked"),
        (MASKED + 1, "portable", "chunked"),
    ):
        linked = link(model, made_for(length), target)
        assert [each[LOWERING] for each in said(linked)] == [name, name, name, "blocked"]
        nodes = [node for node in linked.graph.node if node.domain]
        assert [len(node.output) for node in nodes] == [1, 1, 2, 1]
        # A body with a state and one without are two where the lowering has both.
        inputs = 2 if name == "masked" else 3
        assert [node.op_type for node in nodes] == [
            f"LinearScan_{name}_{inputs}to1",
            f"LinearScan_{name}_3to1",
            f"LinearScan_{name}_{inputs}to2",
            "LinearScan_blocked_3to1",
        ]
        assert sorted({node.op_type for node in nodes}) == bodies(linked, "LinearScan")
        assert_right(linked, module)


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtimes_own_tools_take_a_graph(bundle: ee.Bundle, graph: str, tmp_path: Path) -> None:
    """Dynamic quantization compares what is said of every shape with what it infers."""
    model = onnx.load(bundle.file(f"{graph}/model.onnx"))
    held = {tensor.name for tensor in model.graph.initializer}
    assert not held & {value.name for value in model.graph.value_info}
    quantize_dynamic(bundle.file(f"{graph}/model.onnx"), tmp_path / "model.onnx")
    inputs, outputs = next(bundle.test_data(graph))[1:]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(list(outputs), inputs), outputs.values(), strict=True):
        assert np.abs(found - wanted).max() < 0.5 * max(1, np.abs(wanted).max())


def test_no_two_functions_have_a_name_and_what_is_called_comes_first() -> None:
    """Runtimes below 1.27 take overloads of one name for one another; ONNX's own evaluator reads functions in turn."""
    module = Scans()
    for length, target in ((None, "portable"), (MASKED, "portable"), (MASKED, "dml")):
        linked = link(traced(module, X.shape, ("batch", 4)), made_for(length), target)
        known: set[str] = set()
        for function in linked.functions:
            assert not function.overload
            assert function.name not in known
            assert {node.op_type for node in all_nodes(function.node) if node.domain} <= known
            known.add(function.name)
        assert {node.op_type for node in linked.graph.node if node.domain} <= known
        assert not any(node.overload for node in all_nodes(linked.graph.node))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
    for found, wanted in zip(ReferenceEvaluator(linked).run(None, {"x": x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, op in LOWERINGS.items() if op.domain == "edifice"])
def test_the_names_that_kernels_go_by_are_those_of_the_page(name: str) -> None:
    """docs/kernels.md lists every body that a graph may hold, and no other."""
    page = (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
    op = LOWERINGS[name]
    listed = [found for found in re.findall(r"`(\w+_\d+to\d+)`", page) if op_of(found) == op.op_type]
    possible = {
        body_name(op.op_type, each.name, each.inputs, outputs)
        for each in op.lowerings
        for outputs in range(1, op.declared.outputs + 1)
    }
    assert sorted(listed) == sorted(possible)
    assert len(possible) == len({found.lower() for found in possible})


def test_zeros_that_nodes_start_from_are_one_constant() -> None:
    model = traced(Scans(), X.shape, ("batch", 4))
    linked = link(model, {"sequence": 1000})
    zeros = [tensor for tensor in linked.graph.initializer if tensor.name.startswith("zeros")]
    assert [list(tensor.dims) for tensor in zeros] == [[1, 4]]
    assert not np.any(onnx.numpy_helper.to_array(zeros[0]))
    assert all(len(node.input) == 3 for node in linked.graph.node if node.domain)


class Same(nn.Module):
    """Two scans that differ in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = ops.linear_scan(x * self.scale / 2, -x[..., :1].abs())[0]
        return x


def test_nodes_that_do_not_differ_share_a_body() -> None:
    module = Same()
    linked = link(traced(module, X.shape), {"sequence": 50})
    assert bodies(linked, "LinearScan") == ["LinearScan_either_3to1"]
    assert len(said(linked)) == 2
    assert_right(linked, module)


def test_what_is_not_read_is_not_computed() -> None:
    """Neither the state nor the nodes that lead to it alone."""

    class Reads(nn.Module):
        def __init__(self, state: bool) -> None:
            super().__init__()
            self.state = state
            self.rates = nn.Parameter(-torch.rand(1, 3))
            self.weight = nn.Parameter(torch.rand(4, 3))

        def forward(self, x: Tensor) -> Any:
            weights = (x @ self.weight)[:, :, None]
            found = ops.diagonal_scan(x, self.rates, weights, weights)
            return found if self.state else found[0]

    y, state = ("batch", "sequence", 1, 4), ("batch", 1, 3, 4)
    both, first = Reads(True), Reads(False)
    whole, part = link(traced(both, y, state), {"sequence": 50}, "dml"), link(traced(first, y), {"sequence": 50}, "dml")
    assert bodies(whole, "DiagonalScan") == ["DiagonalScan_masked_4to2"]
    assert bodies(part, "DiagonalScan") == ["DiagonalScan_masked_4to1"]
    assert "StateAfter" in {function.name for function in whole.functions}
    assert "StateAfter" not in {function.name for function in part.functions}
    for model, module in ((whole, both), (part, first)):
        assert_right(model, module)
        for function in model.functions:
            read = {name for node in all_nodes(function.node) for name in node.input} | set(function.output)
            assert all(read & set(node.output) for node in function.node)


def test_a_reason_is_given_for_every_choice() -> None:
    linked = link(traced(Scans(), X.shape, ("batch", 4)), {"sequence": MASKED})
    assert [each[REASON] for each in said(linked)] == [*[f"{MASKED} frames, at most {MASKED}"] * 3, "the only one"]
    assert said(link(traced(Scans(), X.shape, ("batch", 4))))[0][REASON] == "any number of frames"


def test_linking_leaves_the_graph_alone_and_gives_the_same_again() -> None:
    model = traced(Scans(), X.shape, ("batch", 4))
    before = ir.to_proto(model)
    first = link(model, {"sequence": 50})
    assert ir.to_proto(model) == before
    assert link(model, {"sequence": 50}).SerializeToString(deterministic=True) == first.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize(
    ("size", "sizes", "expected"),
    [
        (5, {}, 5),
        ("batch", {}, 1),
        ("sequence", {"sequence": 60}, 60),
        ("sequence", {}, None),
        ("sequence + 4", {"sequence": 60}, 64),
        ("sequence + 4", {}, None),
        ("min(7, sequence)", {}, 7),
        ("min(7, sequence)", {"sequence": 60}, 7),
        ("min(7, sequence)", {"sequence": 3}, 3),
        ("window", {"sequence": 60}, None),
        ("height + width + 2", {"height": 5, "width": 6}, 13),
        ("height + width", {"height": 5}, None),
        ("height*width", {"height": 5, "width": 6}, None),
    ],
)
def test_a_choice_knows_what_sizes_are_made_for(
    monkeypatch: pytest.MonkeyPatch, size: int | str, sizes: dict[str, int], expected: int | None
) -> None:
    seen: list[Call] = []

    monkeypatch.setattr(Op, "choose", lambda _, call: seen.append(call))
    x = ir.Value(name="x", shape=ir.Shape(["batch", size, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("LinearScan", [x, x], domain="edifice", num_outputs=2, name="scan")
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 20, "edifice": 1})
    with pytest.raises(CheckError, match="scan: edifice::LinearScan has no body for 2 inputs"):
        link(ir.Model(graph, ir_version=10), {"batch": 1} | sizes, "web")
    (call,) = seen
    assert call.shapes[0] == ("batch", size, 4)
    assert call.expected[0] == (1, expected, 4)
    assert (call.target, call.scans) == ("web", False)


@pytest.mark.parametrize("name", LOWERINGS)
def test_nothing_but_a_state_may_be_left_out(name: str) -> None:
    """With one input less than that, no body fits."""
    op = LOWERINGS[name]
    for given in range(1, min(each.inputs for each in op.lowerings)):
        call = Call((("batch", "sequence", 4),) * given, ((1, None, 4),) * given, (None,) * given)
        assert bool(op.fitting(call)) == (op.declared.fresh <= given)
