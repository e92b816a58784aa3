"""A size that is added to a vector stays a vector of one: no Squeeze between Shape and the sum.

ONNX Runtime's WebGPU build may reuse the memory of the squeezed size before the sum reads it: the position of a stream
after a prefill was garbage, now and then.
"""

from __future__ import annotations

import onnx_ir as ir

from .editing import given, remove

__all__ = ["sizes_as_vectors"]


def sizes_as_vectors(model: ir.Model) -> int:
    """Add(vector, Squeeze(Shape(x))) -> Add(vector, Shape(x)), which is the same by broadcasting.

    Returns:
        How many were rewritten.
    """
    found = 0
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain or any(value is None for value in node.inputs):
            continue
        for index in (0, 1):
            squeeze, other = given(node, index).producer(), given(node, 1 - index)
            if squeeze is None or squeeze.op_type != "Squeeze" or not other.shape:
                continue
            size = given(squeeze, 0)
            shape = size.producer()
            if shape is None or shape.op_type != "Shape" or size.shape != (1,):
                continue
            node.replace_input_with(index, size)
            if not squeeze.outputs[0].uses() and not squeeze.outputs[0].is_graph_output():
                remove(model.graph, [squeeze])
            found += 1
    return found
