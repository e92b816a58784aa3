"""Link: choose a lowering for each edifice op of an abstract graph, and attach its function body."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..bundle.body_names import body_name
from ..bundle.manifest import LOWERING, REASON
from ..errors import CheckError
from ..lowerings import HELPERS, LOWERINGS, op_of_node
from ..lowerings.domain import VERSION
from ..lowerings.lowering import Body, Call, Choice, Op
from ..specification import Size

__all__ = ["IR_VERSION", "check", "link", "say_shapes_once"]

Dims = tuple[int | None, ...] | None
"""Sizes of a value, None for one that is free; or None where nothing is known."""

Sizes = list[Dims]
"""Of every input of a node."""

IR_VERSION = 10
"""Old enough for runtimes of 2024; the first in which nodes have metadata."""


def link(model: ir.Model, sizes: Mapping[str, int] | None = None, target: str = "portable") -> onnx.ModelProto:
    """Chooses a lowering for each op and attaches its body, which the node then calls: see body_names.

    Args:
        model: an abstract graph; it is not changed.
        sizes: the numbers that free sizes are made for, by symbol; those that are not in it may be any. It is right for
            all.
        target: what it is lowered for, see defaults.TARGETS.

    Returns:
        A portable model: standard operators and model-local functions.

    Raises:
        CheckError: an op has no body.
    """
    linked = ir.to_proto(model)
    linked.ir_version = IR_VERSION
    say_shapes_once(linked)
    chosen = [(node, op, _choose(node, op, _call(node, sizes or {}, target))) for node, op in _ops(model)]
    bodies: dict[str, tuple[Body, int, list[Sizes]]] = {}
    protos = {node.name: node for node in linked.graph.node}
    for node, op, choice in chosen:
        proto = protos[node.name]
        given = [_sizes_of(value) for value in node.inputs]
        if choice.lowering.inputs > len(node.inputs):
            given += _give_zeros(linked, proto, node, op)
        outputs = _used_outputs(node)
        del proto.output[outputs:]
        proto.op_type = body_name(op.op_type, choice.lowering.name, choice.lowering.inputs, outputs)
        for attribute, (index, axis) in choice.lowering.sizes.items():
            known = given[index]
            assert known is not None
            proto.attribute.append(onnx.helper.make_attribute(attribute, known[axis]))
        for key, value in ((LOWERING, choice.lowering.name), (REASON, choice.why)):
            proto.metadata_props.add(key=key, value=value)
        bodies.setdefault(_qualified(proto), (choice.lowering.body, outputs, []))[2].append(given)
    functions: list[onnx.FunctionProto] = []
    helpers: dict[str, list[Sizes]] = {}
    for name, (body, outputs, calls) in sorted(bodies.items(), reverse=True):
        functions.append(_function(linked, body, name, outputs, calls, helpers))
    done: set[str] = set()
    while waiting := set(helpers) - done:
        name = max(waiting, key=lambda name: (_depth(name), name))
        done.add(name)
        body = HELPERS[name]
        functions.append(_function(linked, body, name, len(body.to_function_proto().output), helpers[name], helpers))
    linked.functions.extend(reversed(functions))  # what is called comes before what calls it
    return linked


def check(path: Path) -> None:
    """ONNX's full check, with strict shape inference, of a model as it was written (it may be too large for memory).

    Raises:
        CheckError: what the checker says.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckError(f"the linked graph does not pass ONNX's checker: {str(error).strip()}") from error


def say_shapes_once(model: onnx.ModelProto) -> None:
    """Leaves out what is said of initializers again, which are what they are; other tools compare the two."""
    held = {tensor.name for tensor in model.graph.initializer}
    others = [value for value in model.graph.value_info if value.name not in held]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)


def _ops(model: ir.Model) -> Iterator[tuple[ir.Node, Op]]:
    """The nodes that are ops."""
    domains = {op.domain for op in LOWERINGS.values()}
    for node in model.graph:
        op = op_of_node(node)
        if op is not None:
            yield node, op
        elif node.domain in domains:
            raise CheckError(
                f"op {node.domain}::{node.op_type} has no function body; there are: {', '.join(LOWERINGS)}"
            )


def _choose(node: ir.Node, op: Op, call: Call) -> Choice:
    choice = op.choose(call)
    if choice is None:
        form = "one frame with " if op.declared.states and call.is_frame else ""
        raise CheckError(f"{node.name}: {node.domain}::{node.op_type} has no body for {form}{len(node.inputs)} inputs")
    return choice


def _used_outputs(node: ir.Node) -> int:
    """How many outputs of a node there must be: up to the last that anything reads."""
    used = [index for index, value in enumerate(node.outputs, 1) if value.uses() or value.is_graph_output()]
    return max(used, default=1)


def _depth(helper: str) -> int:
    """How many helpers deep a helper calls others: what calls others comes before them."""
    called = {_qualified(node) for node in _all_nodes(HELPERS[helper].to_function_proto().node)}
    return 1 + max(map(_depth, called & HELPERS.keys()), default=0)


def _qualified(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}"


def _call(node: ir.Node, sizes: Mapping[str, int], target: str) -> Call:
    constants = tuple(
        value.const_value.numpy()
        if value is not None and value.is_initializer() and value.const_value is not None
        else None
        for value in node.inputs
    )
    return Call(
        tuple(_symbols_of(value) for value in node.inputs),
        tuple(_expected_sizes(value, sizes) for value in node.inputs),
        constants,
        target,
    )


def _sizes_of(value: ir.Value | None) -> Dims:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _symbols_of(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def _expected_sizes(value: ir.Value | None, sizes: Mapping[str, int]) -> Dims:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else _expected(size, sizes) for size in value.shape)


def _expected(size: ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    """The number that a free size stands for; of the last frames of any number, as many as are taken."""
    parsed = Size.parse(size.value or "?")
    found = parsed.at(sizes)
    return parsed.last if found is None else found


def _give_zeros(model: onnx.ModelProto, proto: onnx.NodeProto, node: ir.Node, op: Op) -> Sizes:
    """Gives a node the states that it starts from: zeros, one for all of a batch, of the sizes of those it leaves."""
    given = []
    for state in op.declared.inputs[len(node.inputs) :]:
        sizes = _sizes_of(node.outputs[1 + op.declared.states.index(state)])
        if sizes is None or None in sizes[1:]:
            raise CheckError(f"{node.name}: the size of its state is not known")
        shape = (1, *(size for size in sizes[1:] if size is not None))
        name = f"zeros_{'x'.join(map(str, shape))}"
        if name not in {tensor.name for tensor in model.graph.initializer}:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
        proto.input.append(name)
        given.append(shape)
    return list(given)


def _function(
    model: onnx.ModelProto,
    body: Body,
    name: str,
    outputs: int,
    calls: Sequence[Sizes],
    helpers: dict[str, list[Sizes]],
) -> onnx.FunctionProto:
    """A function of this name, with constants for the sizes that are the same at all of its calls.

    A runtime makes everything that is computed from constants when it loads a model, and from shapes at every run.

    Args:
        model: what it is for.
        body: what it computes.
        name: its domain and what it is to be called.
        outputs: how many of its outputs are read; what only others need is left out.
        calls: at each call, what is known of the shapes of its inputs.
        helpers: the helpers that it calls are noted here, with what is known of the shapes of their inputs.
    """
    function = body.to_function_proto()
    function.domain, _, function.name = name.partition("::")
    _cut(function, outputs)
    shapes = {
        value: dims[0] if all(other == dims[0] for other in dims) else None
        for value, dims in zip(function.input, zip(*calls, strict=True), strict=True)
    }
    for node in _all_nodes(function.node):
        node.name = node.output[0]  # the variable's name in the function's source
        if _qualified(node) in HELPERS:
            helpers.setdefault(_qualified(node), []).append([shapes.get(value) for value in node.input])
        elif node.op_type == "Shape":
            _make_constant(node, shapes.get(node.input[0]))
    imported = {entry.domain for entry in function.opset_import}
    # onnxscript leaves out what only graphs inside a function use.
    for domain in sorted({node.domain for node in _all_nodes(function.node)} - imported):
        function.opset_import.append(onnx.helper.make_opsetid(domain, VERSION))
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for entry in function.opset_import:
        entry.version = versions.get(entry.domain, VERSION)
        if entry.domain not in versions:
            model.opset_import.append(entry)
    return function


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g.node)


def _cut(body: onnx.FunctionProto, outputs: int) -> None:
    """Leaves the first outputs of a function, and the nodes that they need."""
    del body.output[outputs:]
    needed, kept = set(body.output), []
    for node in reversed(body.node):
        if needed & set(node.output):
            needed |= _read_by(node)
            kept.append(node)
    del body.node[:]
    body.node.extend(reversed(kept))


def _read_by(node: onnx.NodeProto) -> set[str]:
    """What a node reads, graphs inside it included."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= _read_by(inner)
    return found


def _make_constant(node: onnx.NodeProto, dims: Dims) -> None:
    """Makes a constant of a Shape of sizes that are all known."""
    if dims is None:
        return
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    found = dims[attributes.get("start", 0) : attributes.get("end", len(dims))]
    if None not in found:
        constant = onnx.helper.make_node("Constant", [], node.output, node.name, value_ints=found)
        node.CopyFrom(constant)
