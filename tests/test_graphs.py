"""The graphs of a stream: what they take and give, what they are made of, and that they compute what the models do."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TINY
from lowered import nodes
from reference_cases import ODD, USUAL, Streamed
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.building.link import link
from edifice_export.bundle.body_names import op_of
from edifice_export.errors import CheckError
from edifice_export.graph.trace import trace
from edifice_export.passes import optimize
from edifice_export.programs.graphs import entry, signature, state_specs
from edifice_export.specification import InputSpec, OutputSpec, StateSpec, TensorSpec, shape_of
from edifice_reference import ops
from edifice_reference.models.registry import ARCHITECTURES

LOOPS_AND_BRANCHES = {"Scan", "Loop", "If", "SequenceMap"}


@functools.cache
def linked(case: Streamed, graph: str) -> tuple[nn.Module, onnx.ModelProto]:
    """A model of one layer in float32, and one of its graphs as it is in a bundle."""
    model = case.make(num_layers=1).float()
    config = model.config
    states = state_specs(model.initial_state(1))
    traced = trace(entry(model, graph), *signature(graph, config.embed_dim, config.output_size, states), 20, graph)
    optimize(traced)
    return model, link(traced)


EDIFICE = [case for case in USUAL if case.numerics == "edifice"]
each_stream_graph = pytest.mark.parametrize("case", [*EDIFICE, *ODD], ids=str)
each_prefill_graph = pytest.mark.parametrize("case", [EDIFICE[-1], *ODD[1::2]], ids=str)


def stream_models(bundle: ee.Bundle) -> list[onnx.ModelProto]:
    return [onnx.load(bundle.file(bundle.manifest.graphs[name].model)) for name in ("stream", "prefill")]


def test_every_bundle_of_standard_numerics_has_a_stream(bundle: ee.Bundle) -> None:
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]
    states = [state.name for state in bundle.manifest.states]
    for model in stream_models(bundle):
        assert [value.name for value in model.graph.input][1:] == [f"past.{name}" for name in states]
        assert [value.name for value in model.graph.output] == ["output", *(f"present.{name}" for name in states)]


def assert_straight(model: onnx.ModelProto) -> None:
    everything = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert not LOOPS_AND_BRANCHES & {node.op_type for node in nodes(everything)}


def test_a_frames_graph_has_no_loop_and_no_branch(bundle: ee.Bundle) -> None:
    """Not in its functions either."""
    assert_straight(stream_models(bundle)[0])


@each_stream_graph
def test_a_frames_graph_with_other_numerics_or_options_has_no_loop_and_no_branch(case: Streamed) -> None:
    assert_straight(linked(case, "stream")[1])


def test_a_frames_graph_takes_frames_and_any_batch(bundle: ee.Bundle) -> None:
    frame, prefill = stream_models(bundle)
    for model, first in ((frame, ["batch", 6]), (prefill, ["batch", "sequence", 6])):
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        assert shapes.pop(model.graph.input[0].name) == first
        assert shapes["output"] == ["batch", 8]
        for batch, *rest in shapes.values():
            assert batch == "batch"
            assert all(isinstance(size, int) and size > 0 for size in rest)
    # Nothing that is computed on the way is of a batch that was traced.
    for value in frame.graph.value_info:
        assert "batch" in [dim.dim_param for dim in value.type.tensor_type.shape.dim] or is_of_no_batch(
            frame, value.name
        )


def is_of_no_batch(model: onnx.ModelProto, name: str) -> bool:
    """Whether a value depends on constants alone."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(value in fixed for value in node.input):
            fixed.update(node.output)
    return name in fixed


def test_names_say_where_nodes_of_a_stream_come_from(bundle: ee.Bundle) -> None:
    for model in stream_models(bundle):
        names = Counter(node.name for node in model.graph.node)
        assert max(names.values()) == 1
        for name in names:
            # A module's path and what it does there; or what the model itself does.
            assert re.fullmatch(
                r"(blocks\.\d(\.\w+)*|input_projection|final_norm)(/[A-Za-z_]\w*(\.\d)?)+|[a-z]\w*(/\w+)?", name
            )
            assert not re.match(r"node_|n\d+$|val_", name)
        edifice = [node.name for node in model.graph.node if node.domain == "edifice"]
        for layer in range(TINY["num_layers"]):
            assert any(re.match(rf"blocks\.{layer}[./]", name) for name in edifice)
        text = onnx.printer.to_text(model)
        assert "pkg.torch" not in text


def test_nothing_in_a_graph_is_unused(bundle: ee.Bundle) -> None:
    """Of what is, runtimes warn whoever loads it."""
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(bundle.file(graph.model))
        used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
        assert not {tensor.name for tensor in model.graph.initializer} - used
        assert not {value.name for value in model.graph.input} - used
        assert all(used & set(node.output) for node in model.graph.node)


class Session:
    """A graph that goes on from its own states."""

    def __init__(self, model: onnx.ModelProto, state: dict[str, Tensor]) -> None:
        self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        self.past = {f"past.{name}": value.detach().numpy() for name, value in state.items()}

    def __call__(self, frames: Tensor) -> Tensor:
        first = self.session.get_inputs()[0].name
        found = self.session.run(None, {first: frames.numpy(), **self.past})
        self.past = {name.replace("present", "past"): value for name, value in zip(self.names, found, strict=True)}
        return torch.from_numpy(self.past.pop("output"))

    def assert_state(self, expected: dict[str, Tensor]) -> None:
        assert list(self.past) == [f"past.{name}" for name in expected]
        for name, value in expected.items():
            np.testing.assert_allclose(self.past[f"past.{name}"], value, rtol=1e-5, atol=1e-5)


FRAMES = 3 * TINY["window_size"] + 2


@each_stream_graph
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_of_a_frame_is_the_model(case: Streamed, batch: int) -> None:
    model, graph = linked(case, "stream")
    x = torch.randn(batch, FRAMES, TINY["embed_dim"])
    state = model.initial_state(batch)
    session = Session(graph, state)
    with torch.no_grad():
        for t in range(FRAMES):
            expected, state = model.step(x[:, t], state)
            torch.testing.assert_close(session(x[:, t]), expected, rtol=1e-5, atol=1e-5)
        session.assert_state(state)


@each_prefill_graph
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_of_a_history_is_the_model(case: Streamed, batch: int) -> None:
    """In pieces of one frame, of less and of more than a window."""
    model, graph = linked(case, "prefill")
    onnx.checker.check_model(graph, full_check=True)
    x = torch.randn(batch, FRAMES + 3, TINY["embed_dim"])
    state = model.initial_state(batch)
    session = Session(graph, state)
    with torch.no_grad():
        for piece in x.split([1, 4, FRAMES - 3, 1], dim=1):
            expected, state = model.extend(piece, state)
            torch.testing.assert_close(session(piece), expected[:, -1], rtol=1e-5, atol=1e-5)
        session.assert_state(state)


@each_stream_graph
def test_a_frozen_entry_computes_the_same_and_leaves_the_model_alone(case: Streamed) -> None:
    model = case.make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(2, 1, TINY["embed_dim"], dtype=torch.float64), model.initial_state(2)
    with torch.no_grad():
        output, *after = entry(model, "stream")(x[:, 0], *state.values())
        expected, expected_after = model.step(x[:, 0], state)
        last, *_ = entry(model, "prefill")(x, *state.values())
    torch.testing.assert_close([output, last, *after], [expected, expected, *expected_after.values()])
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_of_one_number_is_that_number_and_another_is_a_file() -> None:
    usual = state_specs(Streamed(ARCHITECTURES["hymba"], "standard", {}).make().float().initial_state(1))
    assert {spec.initial for spec in usual} == {0}
    assert StateSpec("0.key", "float32", shape_of("batch", 4, 7, 2), 0.0) in usual
    assert usual[-1] == StateSpec("0.position", "int64", shape_of("batch"), 0)
    options = {"meta_propagation": True}
    primed = state_specs(Streamed(ARCHITECTURES["hymba"], "standard", options).make().initial_state(1))
    files = {spec.name: spec.initial for spec in primed if isinstance(spec.initial, str)}
    names = [spec.name for spec in primed]
    assert files == {
        f"{layer}.{kind}": f"stream/initial/{names.index(f'{layer}.{kind}')}.pb"
        for layer in "01"
        for kind in ("ssm", "conv")
    }
    assert {spec.dtype for spec in primed[:-1]} == {"float64"}


def test_what_each_graph_takes_and_gives() -> None:
    state = StateSpec("0.ssm", "float32", shape_of("batch", 3), 0.0)
    past = InputSpec("past.0.ssm", "float32", shape_of("batch", 3))
    present = OutputSpec("present.0.ssm", "float32", shape_of("batch", 3))
    sequence = InputSpec("state_sequence", "float32", shape_of("batch", "sequence", 6))
    output = OutputSpec("output", "float32", shape_of("batch", 8), "last")
    assert signature("window", 6, 8, ()) == ((sequence,), (output,))
    assert signature("prefill", 6, 8, (state,)) == ((sequence, past), (output, present))
    frame = InputSpec("frame", "float32", shape_of("batch", 6))
    assert signature("stream", 6, 8, (state,)) == ((frame, past), (output, present))


class FramesAndSequences(nn.Module):
    """The same op on a sequence and on one frame."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, frame: Tensor) -> Any:
        y, state = ops.linear_scan(x, -x.abs(), torch.zeros(1, 4))
        return y[:, -1] + ops.linear_scan(frame * self.weight, -frame.abs(), state)[0]


def test_an_op_in_two_forms_has_a_body_for_each() -> None:
    inputs = [
        InputSpec("x", "float32", shape_of("batch", "sequence", 4)),
        InputSpec("frame", "float32", shape_of("batch", 4)),
    ]
    module = FramesAndSequences()
    model = link(trace(module, inputs, [TensorSpec("y", "float32", shape_of("batch", 4))], 20))
    onnx.checker.check_model(model, full_check=True)
    bodies = ["LinearScan_blocked_3to2", "LinearScan_frame_3to1"]
    assert [node.op_type for node in model.graph.node if node.domain == "edifice"] == bodies
    assert [function.name for function in model.functions if op_of(function.name) == "LinearScan"] == bodies
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 20)):
        x, frame = torch.randn(batch, length, 4), torch.randn(batch, 4)
        (found,) = session.run(None, {"x": x.numpy(), "frame": frame.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), module(x, frame), rtol=1e-5, atol=1e-5)


def test_an_op_without_a_body_is_refused() -> None:
    inputs = [
        InputSpec("x", "float32", shape_of("batch", "sequence", 4)),
        InputSpec("frame", "float32", shape_of("batch", 4)),
    ]
    model = trace(FramesAndSequences(), inputs, [TensorSpec("y", "float32", shape_of("batch", 4))], 20)
    (first, second) = [node for node in model.graph if node.domain == "edifice"]
    first.op_type = second.op_type = "NoSuchScan"
    with pytest.raises(CheckError, match="NoSuchScan has no function body; there are: edifice::CausalAttention"):
        link(model)
    first.op_type = second.op_type = "DiagonalScan"
    with pytest.raises(CheckError, match="DiagonalScan has no body for 3 inputs"):
        link(model)
