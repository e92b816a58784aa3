"""Dense layers that read the same input become one: one product instead of several, and its parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir

from .editing import array_of, given, initializer, is_constant, new_value, only_reader, remove

__all__ = ["merge_projections"]


def merge_projections(model: ir.Model) -> int:
    """Gemm(x, W1, b1), Gemm(x, W2), ... -> Split(Gemm(x, [W1; W2], [b1; 0])), for weights [out, in] that are constants.

    A projection that is itself split along its last axis gives its parts directly, and neighbours that are only put
    side by side stay together. Values keep their names.

    Returns:
        How many dense layers were taken away.
    """
    readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if _is_dense(node):
            readers[given(node, 0)].append(node)
    groups = [nodes for nodes in readers.values() if len(nodes) > 1]
    for nodes in groups:
        _merge(model.graph, nodes)
    return sum(len(nodes) - 1 for nodes in groups)


def _is_dense(node: ir.Node) -> bool:
    """Whether a node is x W^T + b, W and b constants."""
    if node.op_type != "Gemm" or node.domain:
        return False
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    found = plain | {name: attribute.value for name, attribute in node.attributes.items()}
    constants = [given(node, index) for index in range(1, len(node.inputs))]
    return (
        found == plain | {"transB": 1}
        and all(is_constant(value) for value in constants)
        and all(len(value.shape or ()) == 1 for value in constants[1:])
        and not node.outputs[0].is_graph_output()
    )


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    name = _unused_name(graph, [(node.name or "").split("/")[0] for node in nodes])
    weights = [array_of(given(node, 1)) for node in nodes]
    inputs = [given(nodes[0], 0), initializer(graph, f"{name}.weight", np.concatenate(weights))]
    if any(len(node.inputs) > 2 for node in nodes):
        biases = [
            array_of(given(node, 2)) if len(node.inputs) > 2 else np.zeros(len(weight), weight.dtype)
            for node, weight in zip(nodes, weights, strict=True)
        ]
        inputs.append(initializer(graph, f"{name}.bias", np.concatenate(biases)))
    product = ir.node("Gemm", inputs, {"transB": 1}, name=name)
    _describe(product.outputs[0], nodes[0].outputs[0], name, sum(map(len, weights)))

    parts, gone = _parts(nodes)
    sizes = np.array([_width(part) for part in parts], np.int64)
    ends = initializer(graph, f"{name}.sizes", sizes)
    split = ir.node("Split", [product.outputs[0], ends], {"axis": -1}, num_outputs=len(parts), name=f"{name}/Split")
    graph.insert_before(nodes[0], [product, split])
    for part, output in zip(parts, split.outputs, strict=True):
        own = cast(str, part.name)
        part.name = f"{own}.merged"
        _describe(output, part, own, cast(int, _width(part)))
        part.replace_all_uses_with(output)
    remove(graph, gone)


def _parts(nodes: Sequence[ir.Node]) -> tuple[list[ir.Value], list[ir.Node]]:
    """What is read of the projections, in their order; and the nodes, later ones first, that are needed no more."""
    parts: list[ir.Value] = []
    gone: list[ir.Node] = []
    for node in nodes:
        inner = _split_of(node.outputs[0])
        parts += inner.outputs if inner is not None else node.outputs
        gone += [node] if inner is None else [inner, node]
    for joined in [found for index in range(len(parts)) if (found := _joins(parts, index)) is not None]:
        start = parts.index(given(joined, 0))
        parts[start : start + len(joined.inputs)] = joined.outputs
        gone.insert(0, joined)
    return parts, gone


def _split_of(value: ir.Value) -> ir.Node | None:
    """The node that a value is only split by, along its last axis, into parts of known sizes."""
    node = _only_standard_reader(value)
    if node is None or node.op_type != "Split" or not _along_the_last_axis(node, value):
        return None
    free = not any(part.is_graph_output() for part in node.outputs)
    return node if free and all(isinstance(_width(part), int) for part in node.outputs) else None


def _joins(parts: Sequence[ir.Value], start: int) -> ir.Node | None:
    """The node that does nothing but put neighbours, from `start` on, side by side again along their last axis."""
    node = _only_standard_reader(parts[start])
    if node is None or node.op_type != "Concat" or not _along_the_last_axis(node, node.outputs[0]):
        return None
    neighbours = tuple(parts[start : start + len(node.inputs)]) == tuple(node.inputs)
    alone = neighbours and all(_only_standard_reader(part) is node for part in parts[start : start + len(node.inputs)])
    known = isinstance(_width(node.outputs[0]), int) and not node.outputs[0].is_graph_output()
    return node if alone and known else None


def _only_standard_reader(value: ir.Value) -> ir.Node | None:
    node = only_reader(value)
    return node if node is not None and not node.domain else None


def _along_the_last_axis(node: ir.Node, value: ir.Value) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return value.shape is not None and axis in (-1, len(value.shape) - 1)


def _unused_name(graph: ir.Graph, paths: Sequence[str]) -> str:
    """`projections` of the module that all of these modules are parts of, with a number if it has others."""
    base = f"{path}/projections" if (path := _common_path(paths)) else "projections"
    taken = {node.name for node in graph}
    return next(
        name for number in range(len(taken) + 1) if (name := f"{base}_{number}" if number else base) not in taken
    )


def _common_path(paths: Sequence[str]) -> str:
    """The module that all of these modules are parts of."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _width(value: ir.Value) -> int | ir.SymbolicDim | None:
    return value.shape[-1] if value.shape else None


def _describe(value: ir.Value, like: ir.Value, name: str, width: int) -> None:
    new_value(value, like, name, [*like.shape[:-1], width] if like.shape is not None else None)
