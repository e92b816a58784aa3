"""Every body of edifice::FftConv is the convolution that torch defines, and each is chosen where it is fastest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import nodes, only
from op_cases import CASES
from torch import Tensor

from edifice_export.building.link import link
from edifice_export.bundle.manifest import LOWERING
from edifice_export.lowerings import LOWERINGS
from edifice_export.lowerings.fft_conv import AT_ONCE, TAPS, TWO_STAGES
from edifice_export.lowerings.lowering import Call, Choice
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_reference import ops

BODIES = [each.name for each in LOWERINGS["edifice::FftConv"].lowerings]
TRANSFORMS = [name for name in BODIES if name != "taps"]

each_body = pytest.mark.parametrize("body", BODIES)
each_transform = pytest.mark.parametrize("body", TRANSFORMS)


def model_of(kernels: Sequence[Tensor], opset: int = 20) -> ir.Model:
    """One convolution for each kernel, a constant or, on the device `meta`, an input; with its own signal."""
    make = onnx.helper.make_tensor_value_info
    inputs, outputs, constants, calls = [], [], [], []
    for index, kernel in enumerate(kernels):
        signal = ["batch", "sequence", kernel.shape[1]]
        inputs.append(make(f"x{index}", onnx.TensorProto.FLOAT, signal))
        outputs.append(make(f"y{index}", onnx.TensorProto.FLOAT, signal))
        if kernel.is_meta:
            inputs.append(make(f"kernel{index}", onnx.TensorProto.FLOAT, ["window", kernel.shape[1]]))
        else:
            constants.append(onnx.numpy_helper.from_array(kernel.float().numpy(), f"kernel{index}"))
        names = [f"x{index}", f"kernel{index}"]
        calls.append(onnx.helper.make_node("FftConv", names, [f"y{index}"], f"call{index}", domain="edifice"))
    graph = onnx.helper.make_graph(calls, "convolutions", inputs, outputs, constants)
    versions = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("edifice", 1)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10))


@dataclasses.dataclass
class Graph:
    """A linked model, run by ONNX Runtime."""

    linked: onnx.ModelProto

    def __post_init__(self) -> None:
        self.session = ort.InferenceSession(self.linked.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *given: Tensor) -> list[Tensor]:
        names = [value.name for value in self.session.get_inputs()]
        feeds = {name: value.float().numpy() for name, value in zip(names, given, strict=True)}
        return [torch.from_numpy(found).double() for found in self.session.run(None, feeds)]


def graph_of(body: str, kernel: Tensor, opset: int = 20) -> Graph:
    """One convolution by this body."""
    with only(CASES["fft_conv"], body):
        return Graph(link(model_of([kernel], opset)))


@functools.cache
def graph_of_any_kernel(body: str, channels: int) -> Graph:
    return graph_of(body, torch.empty(1, channels, device="meta"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """In float64, of values that float32 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def assert_exact(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_body
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 16, 31, 60, 64, 97, 100])
def test_every_length_up_to_the_window(body: str, window: int) -> None:
    x, kernel = draw(2, window, 3), draw(window, 3, seed=1)
    # No frame depends on a later one: the output for a prefix is a prefix of the output.
    whole, graph = ops.fft_conv(x, kernel), graph_of(body, kernel)
    for length in range(1, window + 1):
        (found,) = graph(x[:, :length])
        assert_exact(found, whole[:, :length])


@each_body
@pytest.mark.parametrize("channels", [1, 16, 20, 48])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_batch_and_number_of_channels(body: str, batch: int, channels: int) -> None:
    """Those that ONNX Runtime has a kernel for and others."""
    x, kernel = draw(batch, 127, channels), draw(131, channels, seed=1)
    (found,) = graph_of(body, kernel)(x)
    assert_exact(found, ops.fft_conv(x, kernel))


@each_body
def test_a_kernel_that_is_no_constant(body: str) -> None:
    """Any window and length with one graph: 60 sizes, drawn by hypothesis."""

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), window=st.integers(1, 300), batch=st.integers(1, 5), seed=st.integers(0, 1000))
    def agrees(data: st.DataObject, window: int, batch: int, seed: int) -> None:
        length = data.draw(st.integers(1, window), "length")
        x, kernel = draw(batch, length, 3, seed=seed), draw(window, 3, seed=seed + 1)
        (found,) = graph_of_any_kernel(body, 3)(x, kernel)
        assert_exact(found, ops.fft_conv(x, kernel))

    agrees()


def kernel_of(kind: str, window: int, channels: int) -> Tensor:
    """One that does not decay, one that is the same all along, one that decays, and one of a few far taps."""
    kernel = draw(window, channels, seed=7)
    if kind == "same":
        return torch.ones_like(kernel)
    if kind == "decaying":
        return (kernel * torch.exp(-torch.arange(window) / (window / 8))[:, None]).float().double()
    if kind == "far":
        return torch.where(torch.arange(window)[:, None] % 61 == window % 61, kernel, 0)
    return kernel


def signal_of(kind: str, length: int, channels: int) -> Tensor:
    """One of even magnitude, and one whose frames differ by a thousand and more."""
    x = draw(1, length, channels, seed=8)
    return x if kind == "even" else (x * torch.exp(2 * draw(1, length, 1, seed=9))).float().double()


@each_body
@pytest.mark.parametrize("kernel", ["noise", "same", "decaying", "far"])
@pytest.mark.parametrize("signal", ["even", "mixed"])
@pytest.mark.parametrize("window", [1000, 1024, 4093])
def test_long_windows_are_exact(body: str, window: int, signal: str, kernel: str) -> None:
    x, taps = signal_of(signal, window, 2), kernel_of(kernel, window, 2)
    (found,) = graph_of(body, taps)(x)
    assert_exact(found, ops.fft_conv(x, taps))


@each_transform
@pytest.mark.parametrize("kernel", ["noise", "same"])
@pytest.mark.parametrize("window", [8191, 16384])
def test_the_longest_windows_are_exact(body: str, window: int, kernel: str) -> None:
    x, taps = signal_of("mixed", window, 2), kernel_of(kernel, window, 2)
    graph, whole = graph_of(body, taps), ops.fft_conv(x, taps)
    for length in (window, window // 3, 1):
        (found,) = graph(x[:, :length])
        assert_exact(found, whole[:, :length])


@each_body
@pytest.mark.parametrize("window", [1, 2, 9, 60, 300])
@pytest.mark.parametrize("is_constant", [True, False])
def test_a_sequence_longer_than_the_window_is_refused(body: str, window: int, is_constant: bool) -> None:
    """By one frame too, whatever the size of the transform."""
    kernel = draw(window, 3)
    graph = graph_of(body, kernel) if is_constant else graph_of_any_kernel(body, 3)
    given = () if is_constant else (kernel,)
    assert graph(draw(1, window, 3), *given)[0].shape == (1, window, 3)
    for length in (window + 1, window + 2, 2 * window + 3):
        with pytest.raises(ORT_ERRORS, match="sequence_longer_than_window"):
            graph(draw(1, length, 3), *given)


@each_body
@pytest.mark.parametrize("opset", [18, 20, 26])
def test_bodies_are_valid_in_every_opset(body: str, opset: int) -> None:
    x, kernel = draw(2, 45, 16), draw(45, 16, seed=1)
    graph = graph_of(body, kernel, opset)
    onnx.checker.check_model(graph.linked, full_check=True)
    operators = {node.op_type for function in graph.linked.functions for node in nodes(function.node)}
    # What DirectML lacks, or is slow everywhere.
    assert not {"DFT", "Scan", "Loop", "If"} & operators
    assert_exact(graph(x)[0], ops.fft_conv(x, kernel))


def test_nodes_with_different_bodies_and_sizes_share_a_graph() -> None:
    """Two nodes for each body: the functions that they call know no size that is not the same for all."""
    kernels = [draw(window, channels) for window in (60, TWO_STAGES, 300) for channels in (16, 32)]
    # Not in blocks, so not by taps.
    kernels += [draw(60, 5), torch.empty(70, 5, device="meta")]
    linked = link(model_of(kernels))
    onnx.checker.check_model(linked, full_check=True)
    chosen = [{entry.key: entry.value for entry in node.metadata_props}[LOWERING] for node in linked.graph.node]
    assert chosen == ["taps"] * 2 + ["two_stages"] * 2 + ["three_stages"] * 2 + ["two_stages", "three_stages"]
    kernels[-1] = draw(70, 5)
    signals = [draw(2, 50, kernel.shape[1], seed=index) for index, kernel in enumerate(kernels)]
    for found, x, kernel in zip(Graph(linked)(*signals, kernels[-1]), signals, kernels, strict=True):
        assert_exact(found, ops.fft_conv(x, kernel))


def choose(window: int | str, channels: int | str = 256, is_constant: bool = True, target: str = "portable") -> Choice:
    """The body for a kernel of such sizes, of which those that are strings are not known."""
    shapes = (("batch", "sequence", channels), (window, channels))
    expected = tuple(tuple(size if isinstance(size, int) else None for size in shape) for shape in shapes)
    values = np.zeros((1, 1), np.float32) if is_constant else None
    choice = LOWERINGS["edifice::FftConv"].choose(Call(shapes, expected, (None, values), target))
    assert choice is not None
    return choice


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (choose(1), "taps"),
        (choose(60), "taps"),
        (choose(TAPS), "taps"),
        (choose(TAPS, target="cpu"), "taps"),
        (choose(TAPS + 1), "two_stages"),
        # Where the sum itself is slow.
        (choose(60, channels=AT_ONCE + 1), "two_stages"),
        (choose(60, channels="channels"), "two_stages"),
        (choose(60, is_constant=False), "two_stages"),
        # Where it was not measured.
        (choose(60, target="cuda"), "two_stages"),
        (choose(60, target="dml"), "two_stages"),
        (choose(60, target="web"), "two_stages"),
        (choose(TWO_STAGES), "two_stages"),
        (choose(TWO_STAGES + 1), "three_stages"),
        (choose(8192), "three_stages"),
        # Kernels that grow with the sequence.
        (choose("sequence + 60", is_constant=False), "two_stages"),
        (choose("sequence + 1024", is_constant=False), "three_stages"),
        (choose("window", is_constant=False), "three_stages"),
    ],
)
def test_a_body_is_chosen_by_what_is_known(choice: Choice, name: str) -> None:
    assert choice.lowering.name == name
    assert choice.why


def test_every_body_is_chosen_somewhere() -> None:
    assert {choose(window).lowering.name for window in (60, 256, 1024)} == set(BODIES)
