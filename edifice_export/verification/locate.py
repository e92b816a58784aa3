"""Where a graph departs from its reference: the first node whose value does."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch.export.graph_signature import InputKind

from ..bundle.bundle import Bundle
from ..errors import CheckError, brief
from ..graph.capture import export_program
from ..graph.names import scoped_names
from ..graph.trace import translate
from ..runtime.providers import ORT_ERRORS, open_session
from .reference import Reference
from .report import Given

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Departure", "first_departure"]


@dataclasses.dataclass(frozen=True)
class Departure:
    """A node whose inputs agree with the reference and whose value does not."""

    node: str
    op_type: str
    max_abs: float
    limit: float

    def __str__(self) -> str:
        return f"{self.node} ({self.op_type}), by {self.max_abs:.1e}"


def first_departure(
    bundle: Bundle, reference: Reference, given: Given, graph: str, provider: str, tolerance: float
) -> Departure | None:
    """The first node, in the graph's order, whose value departs from the float64 reference's.

    Values are matched by name: tracing names both after the place in the module that they come from.

    Args:
        bundle: where the graph is.
        reference: what it is held to.
        given: what led to the numbers that depart. The stream graph is run on the last frame, from the state that the
            reference has before that.
        graph: one of manifest.GRAPHS.
        provider: short name.
        tolerance: as in verify, for every value in place of the output.

    Returns:
        The node, or None if all named values agree.
    """
    described = bundle.manifest.graphs[graph]
    feeds = reference.feeds(graph, given)
    expected = _reference_values(bundle, reference.module(graph), graph, feeds)
    model = onnx.load(bundle.file(described.model))
    makers = {name: (node, _key(node, name, expected)) for node in model.graph.node for name in node.output}
    declared = {output.name for output in model.graph.output}
    names = [name for name, (_, key) in makers.items() if key in expected]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "model.onnx"
        onnx.save_model(model, probed, save_as_external_data=True, location="weights")  # of any size
        try:
            found = open_session(probed, [provider]).run(names, feeds)
        except ORT_ERRORS as failure:
            raise CheckError(
                f"bundle {bundle.path}: the {graph} graph is wrong, and ONNX Runtime fails where all of its values are "
                f"asked for: {brief(failure)}; build the bundle again"
            ) from failure
    for name, value in zip(names, found, strict=True):
        node, key = makers[name]
        wanted = expected[key]
        value, wanted = _last_of_both(value, wanted)
        limit = tolerance * max(1.0, float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)))
        error = _distance(value, wanted)
        if not error <= limit:
            op_type = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            return Departure(node.name, op_type, error, limit)
    return None


def _distance(value: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference; none between what is infinite, or no number, on both sides, such as a mask."""
    if value.shape != wanted.shape:
        return math.inf
    other = ~((value == wanted) | (np.isnan(value) & np.isnan(wanted)))
    return float(np.abs(value[other].astype(np.float64) - wanted[other]).max(initial=0))


def _key(node: onnx.NodeProto, name: str, expected: Mapping[str, Any]) -> str:
    """The scoped name of one output of a node: passes leave it to the value, declared outputs to the node."""
    if name in expected:
        return name
    return node.name if len(node.output) == 1 else f"{node.name}.{list(node.output).index(name)}"


def _last_of_both(value: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a value that the graph computes for the last frames alone, the last frame, which is always among the right
    ones: those before may be there only to be convolved. Others as they are.
    """
    if value.ndim != wanted.ndim:
        return value, wanted
    fewer = [axis for axis in range(value.ndim) if 0 < value.shape[axis] < wanted.shape[axis]]
    if len(fewer) != 1:
        return value, wanted
    return value.take(-1, fewer[0]), wanted.take(-1, fewer[0])


def _reference_values(
    bundle: Bundle, module: nn.Module, graph: str, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every floating-point value of the torch graph of a module, by scoped name."""
    described = bundle.manifest.graphs[graph]
    traced = export_program(module, described.inputs)
    outputs = [output.name for output in described.outputs]
    program = translate(traced, described.inputs, bundle.manifest.opset, outputs).exported_program
    assert program is not None
    names = scoped_names(program.graph)
    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.name in names and isinstance(value, torch.Tensor) and value.is_floating_point():
                values[names[n.name]] = value.numpy()
            return value

    held = {**program.state_dict, **program.constants}
    given = (torch.tensor(feeds[spec.name]) for spec in described.inputs)
    exact = (value.double() if value.is_floating_point() else value for value in given)
    arguments = [
        next(exact) if spec.kind == InputKind.USER_INPUT else held[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    with torch.no_grad():
        Recorder(program.graph_module).run(*arguments)
    return values
