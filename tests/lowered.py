"""Edifice ops as ONNX graphs of one node, traced, linked, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from op_cases import CASES, RINGS, SIZES, Arguments, Case
from torch import Tensor, nn

from edifice_export.functions import LOWERINGS
from edifice_export.link import link
from edifice_export.specification import TensorSpec
from edifice_export.trace import trace
from edifice_reference import ops


class Calls(nn.Module):
    """A module that is one call of an op: what enters it are its inputs, other tensors its parameters."""

    def __init__(self, op: str, given: Arguments, entering: list[str]) -> None:
        super().__init__()
        self.op, self.given, self.entering = getattr(ops, op), given, entering
        for name, value in given.items():
            if isinstance(value, Tensor) and name not in entering:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, *inputs: Tensor) -> Any:
        values = self.given | dict(self.named_parameters()) | dict(zip(self.entering, inputs, strict=True))
        del values["anchor"]
        return self.op(*values.values())


@dataclasses.dataclass
class Lowered:
    """One op: its abstract graph, of one node, and the graph with the function bodies that it needs."""

    abstract: onnx.ModelProto
    linked: onnx.ModelProto

    def __post_init__(self) -> None:
        self.session = ort.InferenceSession(self.linked.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, given: Arguments) -> tuple[Tensor, ...]:
        """What the graph gives; the parameters are those that it was made with, whatever is given."""
        feeds = {
            value.name: given[value.name].to(torch.float32 if "float" in value.type else torch.int64).numpy()
            for value in self.session.get_inputs()
        }
        return tuple(torch.from_numpy(found).double() for found in self.session.run(None, feeds))

    def with_constants(self, values: Arguments) -> Lowered:
        """The same graph with these values of its parameters, and of inputs that become constants."""
        abstract = onnx.ModelProto.FromString(self.abstract.SerializeToString())
        for name, value in values.items():
            for held in (abstract.graph.input, abstract.graph.initializer, abstract.graph.value_info):
                for entry in [entry for entry in held if entry.name == name]:
                    held.remove(entry)
            abstract.graph.initializer.append(onnx.numpy_helper.from_array(value.float().numpy(), name))
        return Lowered(abstract, link(ir.from_proto(abstract)))

    def with_parameters(self, given: Arguments) -> Lowered:
        """The same graph with other values of all its parameters."""
        return self.with_constants({tensor.name: given[tensor.name] for tensor in self.abstract.graph.initializer})

    def of_opset(self, opset: int) -> Lowered:
        """The same in another version of the operator set: an edifice op is the same node in each."""
        abstract = onnx.ModelProto.FromString(self.abstract.SerializeToString())
        for entry in abstract.opset_import:
            entry.version = opset if entry.domain == "" else entry.version
        return Lowered(abstract, link(ir.from_proto(abstract)))

    def operators(self) -> set[str]:
        """Standard operators of all functions, those inside of others' bodies among them."""
        return {node.op_type for function in self.linked.functions for node in nodes(function.node) if not node.domain}


def nodes(of: Any) -> list[onnx.NodeProto]:
    """Those nodes and, at any depth, those of the graphs inside them."""
    found = list(of)
    for node in list(found):
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found += nodes(graph.node)
    return found


def camel(op: str) -> str:
    """The name of an op's node."""
    return "".join(part.capitalize() for part in op.split("_"))


FEWER = {"direct": [1, 3], "last": [1], "powers": [1], "state": [1]}
"""Lowerings that read out the last frames alone, and how many of them. "direct" reads out all as well."""

BODIES = {
    "CausalAttention": ("causal_attention", "masked", "all"),
    "CausalAttentionBlocks": ("causal_attention", "blocks", "all"),
    "CausalAttentionEither": ("causal_attention", "either", "all"),
    "CausalConv1d": ("causal_conv1d", "conv", "zero"),
    "CausalConv1dFrame": ("causal_conv1d", "frame", "frame"),
    "CausalConv1dFrom": ("causal_conv1d", "conv", "all"),
    "CumulativeScan": ("cumulative_scan", "masked", "all"),
    "DiagonalScanChunked": ("diagonal_scan", "chunked", "all"),
    "DiagonalScanDirect": ("diagonal_scan", "direct", "zero"),
    "DiagonalScanDirectFrom": ("diagonal_scan", "direct", "all"),
    "DiagonalScanEither": ("diagonal_scan", "either", "zero"),
    "DiagonalScanFrame": ("diagonal_scan", "frame", "frame"),
    "DiagonalScanMasked": ("diagonal_scan", "masked", "zero"),
    "DiagonalScanMaskedFrom": ("diagonal_scan", "masked", "all"),
    "FftConvTaps": ("fft_conv", "taps", "all"),
    "FftConvThreeStages": ("fft_conv", "three_stages", "all"),
    "FftConvTwoStages": ("fft_conv", "two_stages", "all"),
    "FlooredLayerNorm": ("floored_layer_norm", "plain", "all"),
    "LinearScanBlocked": ("linear_scan_own", "blocked", "all"),
    "LinearScanChunked": ("linear_scan", "chunked", "all"),
    "LinearScanEither": ("linear_scan", "either", "all"),
    "LinearScanFrame": ("linear_scan", "frame", "frame"),
    "LinearScanMasked": ("linear_scan", "masked", "zero"),
    "LinearScanMaskedFrom": ("linear_scan", "masked", "all"),
    "SelectiveScanBlocked": ("selective_scan", "blocked", "all"),
    "SelectiveScanExact": ("selective_scan", "exact", "all"),
    "SelectiveScanFrame": ("selective_scan", "frame", "frame"),
    "SelectiveScanLast": ("selective_scan", "last", "last"),
    "SelectiveScanPlain": ("selective_scan", "plain", "all"),
    "SelectiveScanPowers": ("selective_scan", "powers", "last"),
    "SelectiveScanState": ("selective_scan", "state", "last"),
    "SlidingAttention": ("sliding_attention", "blocks", "all"),
    "SlidingAttentionFrame": ("sliding_attention", "frame", "frame"),
    "SlidingAttentionSinks": ("sliding_attention_sinks", "blocks", "all"),
    "SlidingAttentionSinksFrame": ("sliding_attention_sinks", "frame", "frame"),
}
"""Each body: a case that is lowered to it, the lowering's name, and what of the case: all frames, all from a state of
zeros, the last read-out, or one frame. By hand, and not from what linking knows: a body that is missing fails a test.
"""


def lowerings_of(name: str) -> list[str]:
    """Names of the lowerings of a case for sequences that read out all frames."""
    return sorted(lowering for case, lowering, form in BODIES.values() if (case, form) == (name, "all"))


each_lowering = pytest.mark.parametrize(
    ("name", "lowering"), [(name, lowering) for name in CASES for lowering in lowerings_of(name)]
)
each_lowering_with_a_memory = pytest.mark.parametrize(
    ("name", "lowering"),
    [(name, lowering) for name, case in CASES.items() if case.memory for lowering in lowerings_of(name)],
)
each_lowering_that_may_start_from_zeros = pytest.mark.parametrize(
    ("name", "lowering"),
    [
        (name, lowering)
        for name, case in CASES.items()
        if case.memory not in ((), RINGS)
        for lowering in lowerings_of(name)
    ],
)
"""All with a memory but attention that slides, which always has its rings."""


@contextlib.contextmanager
def only(op: str, lowering: str) -> Iterator[None]:
    """Has linking know but one lowering of an op for sequences, beside those for frames."""
    known = LOWERINGS[camel(op)]
    kept = tuple(each for each in known.lowerings if each.name == lowering or each.is_frame)
    with mock.patch.dict(LOWERINGS, {camel(op): dataclasses.replace(known, lowerings=kept)}):
        yield


def lower(case: Case, given: Arguments, entering: tuple[str, ...] = (), lowering: str | None = None) -> Lowered:
    """The op traced in float32, with a free batch and free lengths; of attention that slides also a free window.

    Args:
        entering: the arguments that are inputs of the graph, if not case.entering.
        lowering: the one to take for sequences, if not the one that is preferred.
    """
    with only(case.op, lowering) if lowering is not None else contextlib.nullcontext():
        return _lower(case, given, entering)


def _lower(case: Case, given: Arguments, entering: tuple[str, ...]) -> Lowered:
    given = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    entering = tuple(name for name in given if name in (entering or case.entering))
    is_frame = given[case.streamed[0]].ndim == 2
    shapes = {name: _shape(case, name, given[name], is_frame) for name in entering}
    inputs = [TensorSpec(name, "int64" if name == "position" else "float32", shapes[name]) for name in entering]
    y, *states = (value.shape for value in case.define(given))
    lead = shapes[case.read_out][: 1 if is_frame else 2]
    outputs = [TensorSpec("y", "float32", (*lead, *y[len(lead) :]))]
    for name, state in zip(case.memory or ("state",), states, strict=False):
        outputs.append(TensorSpec(f"{name}_after", "float32", shapes.get(name, ("batch", *state[1:]))))
    module = Calls(case.op, given, list(entering))
    abstract = trace(module, inputs, outputs, 20)
    return Lowered(ir.to_proto(abstract), link(abstract))


def _shape(case: Case, name: str, value: Tensor, is_frame: bool) -> tuple[int | str, ...]:
    if name in case.streamed and not is_frame:
        # Keys that reach further back than queries have a length of their own; a single read-out is just one.
        length = 1 if name == case.read_out and value.shape[1] == 1 else f"length{value.shape[1]}"
        return ("batch", length, *value.shape[2:])
    if name in RINGS:
        return ("batch", value.shape[1], "window", value.shape[3])
    return ("batch", *value.shape[1:])


@functools.cache
def sequence_graph(name: str, lowering: str | None = None) -> Lowered:
    """For sequences, of the sizes that are not free those of SIZES, with no prefix."""
    return lower(CASES[name], CASES[name].arguments(SIZES | {"prefix": 0}), lowering=lowering)


@functools.cache
def frame_graph(name: str) -> Lowered:
    """For single frames."""
    return lower(CASES[name], CASES[name].piece(CASES[name].arguments(SIZES), 0))
