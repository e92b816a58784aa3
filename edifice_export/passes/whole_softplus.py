"""Softplus as one operator: torch's is exact where it is large because it leaves it out there; ONNX's is by itself."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

__all__ = ["whole_softplus"]


def whole_softplus(model: ir.Model) -> int:
    """Where(Greater(x, threshold), x, Softplus(x)) -> Softplus(x), for thresholds from 16, where both are x in float32.

    Returns:
        How many were rewritten.
    """
    found = 0
    for node in list(model.graph):
        if node.op_type != "Where" or node.domain:
            continue
        condition, smooth = (value.producer() if value is not None else None for value in node.inputs[::2])
        if condition is None or smooth is None or condition.op_type != "Greater" or smooth.op_type != "Softplus":
            continue
        if not (condition.inputs[0] is node.inputs[1] is smooth.inputs[0]) or _number(condition.inputs[1]) < 16:
            continue
        replaced, whole = node.outputs[0], smooth.outputs[0]
        if replaced.is_graph_output() or len(whole.uses()) != 1:
            continue
        name = replaced.name
        replaced.replace_all_uses_with(whole)
        smooth.name, node_name = node.name, smooth.name
        model.graph.remove([node], safe=True)
        if not condition.outputs[0].uses():
            threshold = cast(ir.Value, condition.inputs[1])
            model.graph.remove([condition], safe=True)
            if not threshold.uses():
                model.graph.initializers.pop(cast(str, threshold.name), None)
        replaced.name, whole.name = f"{node_name}.unused", name
        found += 1
    return found


def _number(value: ir.Value | None) -> float:
    """The one number of a constant; minus infinity if it is none."""
    array = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(array.numpy().item()) if array is not None and array.size == 1 else float("-inf")
