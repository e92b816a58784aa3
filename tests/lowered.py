"""Ops as ONNX graphs of one node, traced, linked, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from op_cases import CASES, FROM_ZEROS, SIZES, Arguments, Case, arguments
from torch import Tensor, nn

from edifice_export.building.link import link
from edifice_export.graph.trace import trace
from edifice_export.lowerings import LOWERINGS
from edifice_export.lowerings.lowering import Call, Lowering, Op
from edifice_export.specification import InputSpec, TensorSpec, Values, shape_of
from edifice_reference.ops.op import DeclaredOp


class Calls(nn.Module):
    """A module that is one call of an op: what enters it are its inputs, other tensors its parameters."""

    def __init__(self, op: DeclaredOp[..., Any], given: Arguments, entering: Sequence[str]) -> None:
        super().__init__()
        self.op, self.given, self.entering = op, given, entering
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


RINGS = ("past_key", "past_value")


def _is_frame(case: Case, given: Arguments) -> bool:
    return case.op.is_frame(given[case.op.inputs[0]].ndim)


def _shape(case: Case, name: str, value: Tensor, is_frame: bool) -> tuple[int | str, ...]:
    if name in case.streamed and not is_frame:
        # Keys that reach further back than queries have a length of their own; a single read-out is just one.
        length = 1 if name == case.read_out and value.shape[1] == 1 else f"length{value.shape[1]}"
        return ("batch", length, *value.shape[2:])
    if name in RINGS:
        return ("batch", value.shape[1], "window", value.shape[3])
    return ("batch", *value.shape[1:])


def registered(case: Case) -> Op:
    """The op of a case, with its lowerings."""
    return next(op for op in LOWERINGS.values() if op.declared is case.op)


def fitting(case: Case, given: Arguments) -> list[Lowering]:
    """The lowerings of a call: its inputs have free sizes, its parameters are constants."""
    inputs = {name: given[name] for name in case.op.inputs if name in given}
    is_frame = _is_frame(case, given)
    shapes = {
        name: _shape(case, name, value, is_frame) if name in case.entering else tuple(value.shape)
        for name, value in inputs.items()
    }
    expected = {
        name: tuple(size if isinstance(size, int) else None for size in shape) for name, shape in shapes.items()
    }
    constants = (None if name in case.entering else value.numpy() for name, value in inputs.items())
    return registered(case).fitting(Call(tuple(shapes.values()), tuple(expected.values()), tuple(constants)))


Way = tuple[str, Case, Arguments]
"""To call an op: the name of a case, and that case with arguments, from zeros or not, for all read-outs or not."""


def _each_body(ways: Iterable[Way]) -> dict[tuple[Any, ...], Lowering]:
    """Lowerings by name of a case and of the lowering, and what else tells ways apart: no body twice."""
    found: dict[tuple[Any, ...], Lowering] = {}
    for name, case, given in ways:
        for each in fitting(case, given):
            if each.body not in [other.body for other in found.values()]:
                found[name, each.name] = each
    return found


def _arguments(name: str) -> Arguments:
    return CASES[name].arguments(SIZES | {"prefix": 0})


WHOLE = _each_body((name, case, _arguments(name)) for name, case in CASES.items())
"""For sequences that read out all frames, from whatever state."""

FRESH = _each_body((name, *CASES[name].without_memory(_arguments(name))) for name in FROM_ZEROS)
"""The same from zeros."""


def _last(frames: int) -> dict[tuple[Any, ...], Lowering]:
    names = [name for name, case in CASES.items() if case.op.read_out and (frames == 1 or not case.op.reads_one_or_all)]
    whole = _each_body((name, CASES[name], CASES[name].last(arguments(name), frames)) for name in names)
    fresh = _each_body(
        (name, case, case.last(given, frames))
        for name in names
        if name in FROM_ZEROS
        for case, given in [CASES[name].without_memory(arguments(name))]
    )
    return {(*key, frames, False): each for key, each in whole.items()} | {
        (*key, frames, True): each for key, each in fresh.items()
    }


LAST = _last(1) | _last(3)
"""For sequences of which the last frames alone are read out: how many, and whether from zeros."""

FRAMES = _each_body((name, case, case.piece(arguments(name), 0)) for name, case in CASES.items() if case.memory)
"""For single frames."""


def lowerings_of(name: str) -> list[str]:
    """Names of the lowerings of a case for sequences that read out all frames; those that are another's left out."""
    return sorted(lowering for case, lowering in WHOLE if case == name)


each_lowering = pytest.mark.parametrize(("name", "lowering"), list(WHOLE))
each_lowering_with_a_memory = pytest.mark.parametrize(
    ("name", "lowering"), [(name, lowering) for name, lowering in WHOLE if CASES[name].memory]
)
each_lowering_from_zeros = pytest.mark.parametrize(("name", "lowering"), list(FRESH))
each_lowering_of_the_last_frames = pytest.mark.parametrize(("name", "lowering", "frames", "fresh"), list(LAST))


@contextlib.contextmanager
def only(case: Case, lowering: str) -> Iterator[None]:
    """Has linking know but one lowering of an op for sequences, beside those for frames."""
    known = registered(case)
    kept = tuple(each for each in known.lowerings if each.name == lowering or each.is_frame)
    key = f"{known.domain}::{known.op_type}"
    with mock.patch.dict(LOWERINGS, {key: dataclasses.replace(known, lowerings=kept)}):
        yield


def lower(case: Case, given: Arguments, entering: tuple[str, ...] = (), lowering: str | None = None) -> Lowered:
    """The op traced in float32, with a free batch and free lengths; of attention that slides also a free window.

    Args:
        entering: the arguments that are inputs of the graph, if not case.entering.
        lowering: the one to take for sequences, if not the one that is preferred.
    """
    with only(case, lowering) if lowering is not None else contextlib.nullcontext():
        return _lower(case, given, entering)


def _lower(case: Case, given: Arguments, entering: tuple[str, ...]) -> Lowered:
    given = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    entering = tuple(name for name in given if name in (entering or case.entering))
    is_frame = _is_frame(case, given)
    shapes = {name: _shape(case, name, given[name], is_frame) for name in entering}
    dtypes = {name: "int64" if name in case.op.integers else "float32" for name in entering}
    values = {"int64": Values("integers", 3), "float32": Values()}
    inputs = [InputSpec(name, dtypes[name], shape_of(*shapes[name]), values[dtypes[name]]) for name in entering]
    y, *states = (value.shape for value in case.define(given))
    lead = shapes[case.read_out][: 1 if is_frame else 2]
    outputs = [TensorSpec("y", "float32", shape_of(*lead, *y[len(lead) :]))]
    for name, state in zip(case.op.states, states, strict=True):
        outputs.append(TensorSpec(f"{name}_after", "float32", shape_of(*shapes.get(name, ("batch", *state[1:])))))
    module = Calls(case.op, given, entering)
    abstract = trace(module, inputs, outputs, 20)
    return Lowered(ir.to_proto(abstract), link(abstract))


@functools.cache
def sequence_graph(name: str, lowering: str | None = None) -> Lowered:
    """For sequences, of the sizes that are not free those of SIZES, with no prefix."""
    return lower(CASES[name], CASES[name].arguments(SIZES | {"prefix": 0}), lowering=lowering)


@functools.cache
def frame_graph(name: str) -> Lowered:
    """For single frames."""
    return lower(CASES[name], CASES[name].piece(CASES[name].arguments(SIZES), 0))
