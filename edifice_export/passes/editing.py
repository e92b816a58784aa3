"""What passes need to know of graphs: dense layers, constants, and new values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir

__all__ = ["array_of", "axis_of", "given", "initializer", "is_constant", "new_value", "only_reader", "remove"]


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that is there."""
    return cast(ir.Value, node.inputs[index])


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that no one sees from outside."""
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and not value.is_graph_output()
        and value.const_value is not None
    )


def array_of(value: ir.Value | None) -> np.ndarray:
    """The numbers of a constant."""
    return cast(ir.TensorProtocol, cast(ir.Value, value).const_value).numpy()


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value; None if there are others, or the value is an output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def axis_of(node: ir.Node, rank: int, default: int = 0) -> int:
    """The axis attribute of a node, counted from 0."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else default
    return axis % rank


def new_value(
    value: ir.Value, like: ir.Value, name: str, shape: ir.Shape | Sequence[int | ir.SymbolicDim] | None
) -> None:
    """Gives a new node's output its name, the type of another value, and its shape."""
    value.name, value.type = name, like.type
    value.shape = ir.Shape(shape) if shape is not None else None


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of the graph; that of this name if it is the same, and else, if the name is taken, of another name."""
    array, wanted, number = np.array(array, order="C"), name, 0
    while name in graph.initializers:
        held = graph.initializers[name]
        if is_constant(held) and array_of(held).dtype == array.dtype and np.array_equal(array_of(held), array):
            return held
        number += 1
        name = f"{wanted}_{number}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Takes nodes away that nothing reads any more, later ones first, and the constants that only they read."""
    used = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
    graph.remove(nodes, safe=True)
    for value in used:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(cast(str, value.name), None)
