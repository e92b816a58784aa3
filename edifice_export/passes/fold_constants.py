"""What depends on constants alone is computed once, here, and not by every runtime that loads the model."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from .editing import array_of, initializer, is_constant, remove

__all__ = ["fold_constants"]


def fold_constants(model: ir.Model) -> int:
    """A node whose inputs are all constants -> its value, which keeps the node's name.

    Not of what makes more numbers than it takes, such as Expand: a file would hold one number many times.

    Returns:
        How many nodes were folded.
    """
    found = 0
    opset = model.graph.opset_imports[""]
    for node in list(model.graph):
        inputs = [value for value in node.inputs if value is not None]
        if node.domain or not inputs or not all(is_constant(value) for value in inputs):
            continue
        if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
            continue  # it may read other values than its inputs
        if any(value.is_graph_output() or value.name in model.graph.initializers for value in node.outputs):
            continue
        arrays = {cast(str, value.name): array_of(value) for value in inputs}
        results = _evaluate(node, arrays, opset)
        if sum(result.size for result in results) > sum(array.size for array in arrays.values()):
            continue
        for value, result in zip(node.outputs, results, strict=True):
            name = cast(str, value.name)
            value.name = f"{name}.unfolded"
            value.replace_all_uses_with(initializer(model.graph, name, result))
        remove(model.graph, [node])
        found += 1
    return found


def _evaluate(node: ir.Node, arrays: dict[str, np.ndarray], opset: int) -> list[np.ndarray]:
    """What a node gives, by ONNX's own reference."""
    proto = ir.serde.serialize_node(node)
    unknown = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [proto],
        "folded",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in arrays.items()
        ],
        [onnx.helper.make_value_info(name, unknown) for name in proto.output],
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    return [np.asarray(result) for result in evaluator.run(None, arrays)]
