"""Where a graph departs from its reference: the first node whose value does."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from torch.export.graph_signature import InputKind

from .bundle import Bundle, save_model
from .runtime.providers import open_session
from .trace import export_program, scoped_names, translate

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
    bundle: Bundle, reference: nn.Module, sequence: np.ndarray, provider: str, tolerance: float
) -> Departure | None:
    """The first node, in the graph's order, whose value departs from the float64 reference's.

    Values are matched by name: tracing names both after the place in the module that they come from.

    Args:
        bundle: whose window graph to run.
        reference: its reference model in float64.
        sequence: float32 [batch, sequence, embed_dim].
        provider: short name.
        tolerance: as in verify, for every value in place of the output.

    Returns:
        The node, or None if all named values agree.
    """
    expected = _reference_values(bundle, reference, sequence)
    graph = bundle.manifest.graphs["window"]
    model = onnx.load(bundle.file(graph.model))
    makers = {name: node for node in model.graph.node for name in node.output}
    declared = {output.name for output in model.graph.output}
    names = [name for name in makers if makers[name].name in expected]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "model.onnx"
        save_model(model, probed)
        found = open_session(probed, [provider]).run(names, {graph.inputs[0].name: sequence})
    for name, value in zip(names, found, strict=True):
        node = makers[name]
        wanted = expected[node.name]
        if len(node.output) != 1:
            continue
        limit = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
        error = float(np.abs(value - wanted).max(initial=0)) if value.shape == wanted.shape else math.inf
        if not error <= limit:
            op_type = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            return Departure(node.name, op_type, error, limit)
    return None


def _reference_values(bundle: Bundle, reference: nn.Module, sequence: np.ndarray) -> dict[str, np.ndarray]:
    """Every floating-point value of the reference's own graph, by scoped name."""
    graph = bundle.manifest.graphs["window"]
    traced = export_program(reference, graph.inputs)
    program = translate(traced, graph.inputs, bundle.manifest.opset).exported_program
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
    arguments = [
        torch.tensor(sequence, dtype=torch.float64) if spec.kind == InputKind.USER_INPUT else held[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    with torch.no_grad():
        Recorder(program.graph_module).run(*arguments)
    return values
