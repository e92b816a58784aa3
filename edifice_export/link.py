"""Link: attach to an abstract graph the function body of each edifice op it uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from .errors import CheckError
from .functions import HELPERS, LOWERINGS, Body
from .functions.domain import EDIFICE

__all__ = ["IR_VERSION", "check", "link"]

Dims = tuple[int | None, ...] | None
"""Sizes of a value, None for one that is free; or None where nothing is known."""

Sizes = list[Dims]
"""Of every input of a node."""

IR_VERSION = 10
"""Old enough for runtimes of 2024."""


def link(model: ir.Model) -> onnx.ModelProto:
    """Attaches one body per edifice op, for sequences or for single frames, whichever the graph computes.

    Args:
        model: an abstract graph; it is not changed.

    Returns:
        A portable model: standard operators and model-local functions.

    Raises:
        CheckError: an op has no body, or would need two.
    """
    bodies: dict[str, Body] = {}
    for node in model.graph:
        if node.domain == EDIFICE.domain:
            body = _body_of(node)
            if bodies.setdefault(node.op_type, body) is not body:
                raise CheckError(f"{node.name}: the graph uses {node.op_type} in two forms; it can have one")
    linked = ir.to_proto(model)
    linked.ir_version = IR_VERSION
    sizes: dict[str, list[Sizes]] = {}
    for node in model.graph:
        if node.op_type in bodies and node.domain == EDIFICE.domain:
            sizes.setdefault(node.op_type, []).append([_sizes_of(value) for value in node.inputs])
    for name, body in sorted(bodies.items()):
        helpers = _attach(linked, name, body, sizes[name])
        for helper, given in sorted(helpers.items()):
            _attach(linked, helper, HELPERS[helper], given)
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


def _body_of(node: ir.Node) -> Body:
    if node.op_type not in LOWERINGS:
        raise CheckError(f"op {EDIFICE.domain}::{node.op_type} has no function body; there are: {', '.join(LOWERINGS)}")
    body = LOWERINGS[node.op_type].body(node)
    if body is None:
        raise CheckError(f"{node.name}: {EDIFICE.domain}::{node.op_type} has no body for {len(node.inputs)} inputs")
    return body


def _sizes_of(value: ir.Value | None) -> Dims:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _attach(model: onnx.ModelProto, name: str, function: Body, calls: Sequence[Sizes]) -> dict[str, list[Sizes]]:
    """Adds a function under this name, with constants for the sizes that are the same at all of its calls.

    A runtime makes everything that is computed from constants when it loads a model, and from shapes at every run.

    Args:
        model: what it is added to.
        name: of the function.
        function: its body.
        calls: at each call, what is known of the shapes of its inputs.

    Returns:
        The helpers that it calls, with what is known of the shapes of their inputs at each call.
    """
    body = function.to_function_proto()
    body.name = name
    shapes = {
        value: dims[0] if all(other == dims[0] for other in dims) else None
        for value, dims in zip(body.input, zip(*calls, strict=True), strict=True)
    }
    helpers: dict[str, list[Sizes]] = {}
    for node in body.node:
        node.name = node.output[0]  # the variable's name in the function's source
        if node.domain == EDIFICE.domain:
            helpers.setdefault(node.op_type, []).append([shapes.get(value) for value in node.input])
        elif node.op_type == "Shape":
            _make_constant(node, shapes.get(node.input[0]))
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for version in body.opset_import:
        version.version = versions[version.domain]
    model.functions.append(body)
    return helpers


def _make_constant(node: onnx.NodeProto, dims: Dims) -> None:
    """Makes a constant of a Shape of sizes that are all known."""
    if dims is None:
        return
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    found = dims[attributes.get("start", 0) : attributes.get("end", len(dims))]
    if None not in found:
        constant = onnx.helper.make_node("Constant", [], node.output, node.name, value_ints=found)
        node.CopyFrom(constant)
