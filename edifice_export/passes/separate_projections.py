"""A dense layer whose result is only split becomes one for each part: parts may then be computed for fewer frames."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir

from .editing import array_of, axis_of, given, initializer, is_constant, new_value, only_reader, remove

__all__ = ["separate_projections"]


def separate_projections(model: ir.Model) -> int:
    """Split(x W + b) -> x W1 + b1, x W2 + b2, ..., for constants W [in, out] and b. Values keep their names.

    Products of a window are as fast apart as together, and nothing is copied from one buffer to several. It is products
    of one frame (Gemm) that gain from being one, see merge_projections.

    Returns:
        How many layers were separated.
    """
    found = 0
    for node in list(model.graph):
        added = given(node, 0).producer() if node.op_type == "Split" and not node.domain else None
        product = given(added, 0).producer() if added is not None and added.op_type == "Add" else None
        if added is None or product is None or product.op_type != "MatMul":
            continue
        weight, bias = given(product, 1), given(added, 1)
        parts = node.outputs
        sizes = [part.shape[-1] if part.shape is not None else None for part in parts]
        if (
            is_constant(weight)
            and is_constant(bias)
            and len(weight.shape or ()) == 2
            and bias.shape == weight.shape[1:]  # type: ignore[index]
            and only_reader(product.outputs[0]) is added
            and only_reader(added.outputs[0]) is node
            and parts[0].shape is not None
            and axis_of(node, len(parts[0].shape)) == len(parts[0].shape) - 1
            and all(isinstance(size, int) for size in sizes)
            and not any(part.is_graph_output() for part in parts)
        ):
            _separate(model.graph, product, added, node, cast(list[int], sizes))
            found += 1
    return found


def _separate(graph: ir.Graph, product: ir.Node, added: ir.Node, split: ir.Node, sizes: list[int]) -> None:
    weight, bias = given(product, 1), given(added, 1)
    ends = np.cumsum(sizes)[:-1]
    weights, biases = np.split(array_of(weight), ends, axis=1), np.split(array_of(bias), ends)
    for index, part in enumerate(split.outputs):
        if not part.uses():
            continue
        name = cast(str, part.name)
        w = initializer(graph, f"{weight.name}.{index}", weights[index])
        b = initializer(graph, f"{bias.name}.{index}of{len(sizes)}", biases[index])
        multiply = ir.node("MatMul", [given(product, 0), w], name=f"{product.name}.{index}")
        new_value(multiply.outputs[0], part, f"{product.name}.{index}", part.shape)
        add = ir.node("Add", [multiply.outputs[0], b], name=f"{added.name}.{index}")
        graph.insert_before(split, [multiply, add])
        part.name = f"{name}.split"
        new_value(add.outputs[0], part, name, part.shape)
        part.replace_all_uses_with(add.outputs[0])
    remove(graph, [split, added, product])
