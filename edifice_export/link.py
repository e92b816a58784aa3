"""Link: attach to an abstract graph the function body of each edifice op it uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from .errors import CheckError
from .functions import HELPERS, LOWERINGS, Body
from .functions.domain import EDIFICE

__all__ = ["IR_VERSION", "check", "link"]

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
    for name, body in sorted(bodies.items()):
        _attach(linked, name, body)
    for name in sorted({helper for body in bodies.values() for helper in _helpers(body)}):
        _attach(linked, name, HELPERS[name])
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
    first = node.inputs[0]
    is_frame = first is not None and first.shape is not None and len(first.shape) == 2
    body = LOWERINGS[node.op_type].body(len(node.inputs), is_frame)
    if body is None:
        raise CheckError(f"{node.name}: {EDIFICE.domain}::{node.op_type} has no body for {len(node.inputs)} inputs")
    return body


def _helpers(body: Body) -> Iterator[str]:
    for node in body.to_function_proto().node:
        if node.domain == EDIFICE.domain:
            yield node.op_type


def _attach(model: onnx.ModelProto, name: str, function: Body) -> None:
    body = function.to_function_proto()
    body.name = name
    for node in body.node:
        node.name = node.output[0]  # the variable's name in the function's source
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for version in body.opset_import:
        version.version = versions[version.domain]
    model.functions.append(body)
