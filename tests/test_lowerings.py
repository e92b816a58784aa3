"""The ONNX functions of the ops compute what the torch definitions do."""

from __future__ import annotations

import dataclasses
import functools
import math

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import (
    FRAMES,
    FRESH,
    LAST,
    WHOLE,
    Lowered,
    each_lowering,
    each_lowering_from_zeros,
    each_lowering_of_the_last_frames,
    each_lowering_with_a_memory,
    frame_graph,
    lower,
    lowerings_of,
    nodes,
    registered,
    sequence_graph,
)
from op_cases import (
    CASES,
    SIZES,
    Arguments,
    arguments,
    each_op,
    each_op_of_a_shared_memory,
    each_op_with_a_memory,
)
from torch import Tensor, nn

from edifice_export.building.link import link
from edifice_export.bundle.body_names import op_of
from edifice_export.defaults import OPSETS
from edifice_export.graph.trace import trace
from edifice_export.lowerings import LOWERINGS
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_export.specification import InputSpec, Values, shape_of
from edifice_reference import ops

SEVERAL = settings(max_examples=40, deadline=None)

Outputs = tuple[Tensor, ...]


def assert_agree(found: Outputs, expected: Outputs) -> None:
    """To 1e-5, or 1e-5 of the largest value where that is above 1; every output, states among them."""
    for value, wanted in zip(found, expected, strict=True):
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(value, wanted, atol=1e-5 * scale, rtol=1e-5)


def forms(name: str) -> list[tuple[Lowered, Arguments]]:
    """The graphs of an op, with arguments."""
    case = CASES[name]
    given = case.arguments(SIZES | {"prefix": 0})
    whole = [(sequence_graph(name, lowering), given) for lowering in lowerings_of(name)]
    return [*whole, (frame_graph(name), case.piece(given, 0))] if case.memory else whole


@each_op
def test_every_op_has_a_function_and_no_function_is_idle(name: str) -> None:
    op = registered(CASES[name])
    for graph, _ in forms(name):
        (node,) = graph.abstract.graph.node
        assert (node.domain, node.op_type) == (op.domain, op.op_type)
        functions = {function.name: function for function in graph.linked.functions}
        called = {inner.op_type for function in functions.values() for inner in nodes(function.node) if inner.domain}
        (body,) = (node.op_type for node in graph.linked.graph.node if node.domain)
        assert op_of(body) == op.op_type
        assert set(functions) == {body} | called
        assert len(functions) == len(graph.linked.functions)
        onnx.checker.check_model(graph.linked, full_check=True)


BOUNDS = (OPSETS[0], 20, OPSETS[-1])
"""The oldest opset, the default and the newest."""


@each_op
@pytest.mark.parametrize(
    "opset", [n if n in BOUNDS else pytest.param(n, marks=pytest.mark.slow) for n in range(OPSETS[0], OPSETS[-1] + 1)]
)
def test_functions_are_valid_in_every_opset(name: str, opset: int) -> None:
    for form, values in forms(name):
        graph = form.of_opset(opset)
        onnx.checker.check_model(graph.linked, full_check=True)
        for function in graph.linked.functions:
            imported = {(entry.domain, entry.version) for entry in function.opset_import}
            assert imported - {("edifice", 1), ("mine", 1)} <= {("", opset)}
        assert_agree(graph(values), CASES[name].define(values))


@each_lowering
def test_one_graph_serves_every_size(name: str, lowering: str) -> None:
    """Any batch and length after one trace, from any state: 40 sizes, drawn by hypothesis."""
    case, graph = CASES[name], sequence_graph(name, lowering)

    @SEVERAL
    @given(batch=st.integers(1, 5), length=st.integers(1, 70), window=st.integers(1, 9), seed=st.integers(0, 1000))
    def agrees(batch: int, length: int, window: int, seed: int) -> None:
        sizes = {"batch": batch, "sequence": length, "window": window, "prefix": 0}
        values = case.entering_arguments(SIZES | sizes, seed)
        assert_agree(graph(values), case.define(values))

    agrees()


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("causal_attention", "blocks"),
        ("causal_attention", "either"),
        ("linear_scan", "either"),
        ("diagonal_scan", "chunked"),
        ("linear_scan", "chunked"),
        ("linear_scan_own", "blocked"),
        ("selective_scan", "blocked"),
    ],
)
@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 256, 257, 300])
def test_blocks_may_be_full_or_not(name: str, lowering: str, length: int) -> None:
    case = CASES[name]
    values = case.entering_arguments(SIZES | {"sequence": length, "prefix": 0}, length)
    assert_agree(sequence_graph(name, lowering)(values), case.define(values))


@each_lowering_with_a_memory
def test_a_sequence_cut_anywhere_is_the_whole(name: str, lowering: str) -> None:
    case, graph = CASES[name], sequence_graph(name, lowering)

    @SEVERAL
    @given(length=st.integers(2, 40), seed=st.integers(0, 1000), data=st.data())
    def agrees(length: int, seed: int, data: st.DataObject) -> None:
        values = case.entering_arguments(SIZES | {"sequence": length}, seed)
        cut = data.draw(st.integers(1, length - 1), "cut")
        assert_agree(case.in_pieces(graph, values, [cut]), case.define(values))

    agrees()


@each_op_with_a_memory
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_frame_by_frame_is_the_whole(name: str, batch: int) -> None:
    case = CASES[name]
    values = case.entering_arguments(SIZES | {"batch": batch, "sequence": 40}, batch)
    assert_agree(case.by_frames(frame_graph(name), values), case.define(values))


@each_op_with_a_memory
def test_a_history_and_then_frame_by_frame_is_the_whole(name: str) -> None:
    case = CASES[name]
    values = case.entering_arguments(SIZES | {"sequence": 40}, 1)
    history, rest = case.piece(values, slice(0, 23)), case.piece(values, slice(23, 40))
    first = sequence_graph(name)(history)
    then = case.by_frames(frame_graph(name), case.after(rest, first, 23))
    assert_agree((torch.cat([first[0], then[0]], dim=1), *then[1:]), case.define(values))


@each_op_of_a_shared_memory
@pytest.mark.parametrize("is_frame", [False, True])
def test_one_memory_serves_every_entry_of_a_batch(name: str, is_frame: bool) -> None:
    """As in the graph of a window, to which the state before it is a constant."""
    case = CASES[name]
    shared = {memory: arguments(name)[memory][:1] for memory in case.memory}
    graph = (frame_graph if is_frame else sequence_graph)(name).with_constants(shared)
    for batch in (1, 2, 5):
        drawn = case.entering_arguments(SIZES | {"batch": batch}, batch) | shared
        drawn = case.piece(drawn, 0) if is_frame else drawn
        if (name, is_frame) == ("causal_conv1d", True) and batch > 1:
            # It has a past of each entry's own; in every stream there is one.
            with pytest.raises(ORT_ERRORS):
                graph(drawn)
        else:
            assert_agree(graph(drawn), case.define(drawn))


@each_lowering_from_zeros
def test_no_memory_is_one_of_zeros(name: str, lowering: str) -> None:
    """As in the graph of a window; the state that is left is read too."""
    case, given = CASES[name].without_memory(arguments(name))
    graph = lower(case, given, lowering=lowering)
    onnx.checker.check_model(graph.linked, full_check=True)
    for batch, length in ((1, 1), (3, 8), (2, 65), (1, 130)):
        drawn = CASES[name].entering_arguments(SIZES | {"batch": batch, "sequence": length, "prefix": 0}, 1)
        drawn = {key: value for key, value in drawn.items() if key in given}
        assert_agree(graph(drawn), case.define(drawn))


@each_lowering_of_the_last_frames
def test_the_last_frames_alone_are_those_of_all(name: str, lowering: str, frames: int, fresh: bool) -> None:
    case, whole = CASES[name], arguments(name)
    if fresh:
        case, whole = case.without_memory(whole)
    graph = lower(case, case.last(whole, frames), lowering=lowering)
    for batch, length in ((1, frames), (3, 9), (2, 70), (1, 300)):
        drawn = CASES[name].entering_arguments(SIZES | {"batch": batch, "sequence": length, "prefix": 3}, 1)
        drawn = case.last({key: drawn[key] if key in case.entering else value for key, value in whole.items()}, frames)
        assert_agree(graph(drawn), case.define(drawn))


@functools.cache
def _from_zeros() -> Lowered:
    case, given = CASES["diagonal_scan"].without_memory(arguments("diagonal_scan"))
    return lower(case, given, lowering="either")


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 200])
def test_either_is_right_on_both_sides_of_its_crossover(length: int) -> None:
    """Of a scan from a state of zeros; for the others see test_blocks_may_be_full_or_not."""
    case, given = CASES["diagonal_scan"].without_memory(arguments("diagonal_scan", sequence=length))
    given["log_decay"] = arguments("diagonal_scan")["log_decay"]
    assert "If" in _from_zeros().operators()
    assert_agree(_from_zeros()(given), case.define(given))


@pytest.mark.parametrize("name", LOWERINGS)
def test_every_body_is_tested(name: str) -> None:
    """By one of the lists that the tests above run through, each of which has what fits its calls."""
    tested = [each.body for ways in (WHOLE, FRESH, LAST, FRAMES) for each in ways.values()]
    assert [each.name for each in LOWERINGS[name].lowerings if each.body not in tested] == []


class TwoOfEach(nn.Module):
    """Two calls of each op that differ in their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(6, 1, size) for size in (2, 5))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, position: Tensor, *rings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for kernel in self.kernels:
            past = torch.ones(1, kernel.shape[2] - 1, 6)
            x = ops.causal_conv1d(x, kernel, self.bias, 6, past)[0]
        x, narrow, _ = ops.sliding_attention(x, x, x, 2, 0.0, rings[0], rings[0], position)
        x, wide, _ = ops.sliding_attention(x, x, x, 3, 0.0, rings[1], rings[1], position)
        return x, narrow, wide


def test_nodes_of_different_sizes_share_a_function() -> None:
    module = TwoOfEach()
    inputs = [
        InputSpec("x", "float32", shape_of("batch", "sequence", 6)),
        InputSpec("position", "int64", shape_of("batch"), Values("integers", 9)),
        InputSpec("narrow", "float32", shape_of("batch", 2, 4, 3)),
        InputSpec("wide", "float32", shape_of("batch", 3, 7, 2)),
    ]
    outputs = [dataclasses.replace(spec, name=f"{spec.name}_after") for spec in inputs if spec.dtype == "float32"]
    linked = link(trace(module, inputs, outputs, 20))
    onnx.checker.check_model(linked, full_check=True)
    session = ort.InferenceSession(linked.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 10)):
        values = [
            torch.randn(*(size for size in spec.at({"batch": batch, "sequence": length}) if size is not None))
            for spec in inputs
        ]
        values[1] = torch.arange(batch) * 5
        feeds = {spec.name: value.numpy() for spec, value in zip(inputs, values, strict=True)}
        found = tuple(torch.from_numpy(value) for value in session.run(None, feeds))
        with torch.no_grad():
            assert_agree(found, module(*values))


@each_op_with_a_memory
def test_the_graph_of_one_frame_has_no_loop_and_no_branch(name: str) -> None:
    assert not {"Scan", "Loop", "If"} & frame_graph(name).operators()


def test_loops_are_found_where_they_are() -> None:
    assert "Scan" in sequence_graph("selective_scan", "plain").operators()
    # It is in the body of the Scan alone.
    assert "Exp" in sequence_graph("selective_scan", "plain").operators()


@functools.cache
def prefixed_graph() -> Lowered:
    return lower(CASES["causal_attention"], arguments("causal_attention"))


@pytest.mark.parametrize("prefix", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attention_sees_its_prefix(prefix: int, length: int) -> None:
    case = CASES["causal_attention"]
    values = case.arguments(SIZES | {"prefix": prefix, "sequence": length}, 5)
    torch.testing.assert_close(prefixed_graph()(values), case.define(values), atol=1e-5, rtol=1e-7)


@pytest.mark.parametrize("is_frame", [False, True])
def test_a_convolution_of_one_tap_has_no_past(is_frame: bool) -> None:
    """Its past has no frames and is a constant."""
    case, nothing = CASES["causal_conv1d"], {"past": torch.zeros(1, 0, SIZES["channels"])}

    def one_tap(batch: int) -> Arguments:
        values = case.entering_arguments(SIZES | {"batch": batch}, batch) | nothing
        values |= {"weight": values["weight"][..., -1:]}
        return case.piece(values, 0) if is_frame else values

    graph = lower(case, one_tap(2), entering=("x",))
    onnx.checker.check_model(graph.linked, full_check=True)
    for batch in (1, 2, 5):
        assert_agree(graph(one_tap(batch)), case.define(one_tap(batch)))


LONG = 4096


def long(name: str, **changed: Tensor) -> Arguments:
    """Arguments of LONG frames, rounded to float32."""
    values = arguments(name, batch=1, sequence=LONG) | changed
    return {key: value.float().double() if isinstance(value, Tensor) else value for key, value in values.items()}


def assert_exact(found: Outputs, expected: Outputs) -> None:
    """To 1e-5 of the largest value, against float64 and the same float32 arguments; of every output."""
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def exact_at_length(name: str, given: Arguments) -> None:
    """At a length of LONG, at once and frame by frame."""
    case = CASES[name]
    expected = case.define(given)
    assert_exact(sequence_graph(name).with_parameters(given)(given), expected)
    assert_exact(case.by_frames(frame_graph(name).with_parameters(given), given), expected)


# Decays of a frame from exp(-1e-5), of which all of the sequence is left, to exp(-20), of which nothing is.
each_rate = pytest.mark.parametrize("rate", [1e-5, 1.12e-4, 1.37e-3, 0.0113, 0.1, 1.0, 20.0])


@pytest.mark.parametrize(
    ("low", "high"),
    [(1e-5, 1e-5), (1.12e-4, 1.12e-4), (1e-3, 1e-3), (1.37e-3, 1.37e-3), (0.1, 0.1), (1e-3, 0.1), (20.0, 20.0)],
)
def test_the_selective_scan_is_exact_at_length_4096(low: float, high: float) -> None:
    """With Hymba's rates, decays near 1 and near 0: both ends of its step's range, and far below and above."""
    a = -torch.arange(1.0, SIZES["state"] + 1, dtype=torch.float64).expand(SIZES["channels"], -1)
    delta = torch.linspace(low, high, LONG, dtype=torch.float64)[None, :, None].expand(1, LONG, SIZES["channels"])
    exact_at_length("selective_scan", long("selective_scan", delta=delta.contiguous(), a=a))


@each_rate
def test_the_linear_scan_is_exact_at_length_4096(rate: float) -> None:
    decay = torch.full((1, LONG, 1), -rate, dtype=torch.float64)
    exact_at_length("linear_scan", long("linear_scan", log_decay=decay))


@pytest.mark.parametrize("rate", [1.0, 30.0, math.inf])
def test_nothing_is_left_of_a_past_that_has_decayed(rate: float) -> None:
    """Each frame is right for itself, however much larger those before it were."""
    case = CASES["linear_scan"]
    values = case.arguments(SIZES | {"sequence": 200})
    loud = torch.exp(3 * torch.randn(2, 200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values |= {"x": (values["x"] * loud).float().double(), "log_decay": torch.full((2, 200, 1), -rate).double()}
    for found in (sequence_graph("linear_scan")(values), case.by_frames(frame_graph("linear_scan"), values)):
        torch.testing.assert_close(found, case.define(values), rtol=3e-5, atol=0)


@each_rate
def test_the_diagonal_scan_is_exact_at_length_4096(rate: float) -> None:
    steps = torch.arange(1.0, SIZES["state"] + 1, dtype=torch.float64)
    decay = torch.stack([-rate * steps, -1e-3 * steps])
    exact_at_length("diagonal_scan", long("diagonal_scan", log_decay=decay))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 31, 64, 65, 1000, LONG])
def test_the_fft_conv_is_exact_for_every_window(window: int) -> None:
    """And for every length up to it; a longer sequence is refused by the graph itself."""
    case = CASES["fft_conv"]
    x, kernel = case.arguments(SIZES | {"sequence": window}, 3).values()
    kernel = kernel[:window]
    graph = sequence_graph("fft_conv").with_constants({"kernel": kernel})
    for length in sorted({1, (window + 1) // 2, window - 1 or 1, window}):
        expected = ops.fft_conv(x[:, :length].float().double(), kernel.float().double())
        (found,) = graph({"x": x[:, :length]})
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    for length in (window + 1, window + 2, 2 * window + 3):
        with pytest.raises(ORT_ERRORS):
            graph({"x": torch.zeros(2, length, 3)})
