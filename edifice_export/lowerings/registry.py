"""Registry: every op that has bodies, by what its nodes are called, and every function that bodies call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import OnnxFunction

from edifice_reference.ops.op import DeclaredOp

from ..errors import RequestError
from .lowering import Body, Call, Lowering, Op

__all__ = ["HELPERS", "LOWERINGS", "op_of_node", "register"]

LOWERINGS: dict[str, Op] = {}
"""By domain and type of their nodes, such as edifice::SelectiveScan."""

HELPERS: dict[str, Body] = {}
"""Functions that bodies call, by domain and name."""

ATTRIBUTES = ("float", "int")
"""What the arguments of an op that are no tensors can be, as torch's schemas say it."""


def op_of_node(node: ir.Node) -> Op | None:
    """The op of a node of an abstract graph; None if it is no registered op."""
    return LOWERINGS.get(f"{node.domain}::{node.op_type}")


def register(
    declared: DeclaredOp[..., Any],
    lowerings: Sequence[Lowering],
    prefer: Callable[[Call], tuple[str, str]] | None = None,
    last: Callable[[ir.Node], Sequence[ir.Node]] | None = None,
) -> Op:
    """Gives an op its bodies. From then on it can be traced, rewritten and linked. See Op for the arguments.

    An op that was declared in the same place takes that of the one before: a file may be loaded again.

    Raises:
        RequestError: there are no bodies, one doesn't fit, or the name is taken.
    """
    op = Op(declared, tuple(lowerings), prefer, last)
    helpers = _helpers_of(op)
    _check(op, helpers)
    if declared.custom is None:
        declared.register()
    HELPERS.update(helpers)
    LOWERINGS[f"{op.domain}::{op.op_type}"] = op
    return op


def _check(op: Op, helpers: dict[str, Body]) -> None:
    name = op.declared.qualified
    held = LOWERINGS.get(f"{op.domain}::{op.op_type}")
    if held is not None and held.declared.place != op.declared.place:
        file, function = held.declared.place
        raise RequestError(f"op {name} is registered already, by {function} in {file}; give one of them another name")
    for argument, kind in op.declared.attributes.items():
        if kind not in ATTRIBUTES:
            raise RequestError(
                f"op {name}: {argument} is of type {kind}; what is no tensor can be {' or '.join(ATTRIBUTES)}"
            )
    if not op.lowerings:
        raise RequestError(f"op {name} has no bodies; give at least one onnxscript function")
    for lowering in op.lowerings:
        _check_body(op, lowering)
    for helper, body in helpers.items():
        # The same file loaded again makes another object of the same function.
        if helper in HELPERS and _is_other(HELPERS[helper], body):
            raise RequestError(f"op {name}: its bodies call {helper}, of which there is another; rename it")


def _check_body(op: Op, lowering: Lowering) -> None:
    """Refuses a body that can't be called in place of the op."""
    declared, body = op.declared, lowering.body
    if not isinstance(body, OnnxFunction):
        raise RequestError(
            f"op {declared.qualified}: {body!r:.80} in bodies is no body; give functions that are decorated with "
            "onnxscript's script"
        )
    proto, name = body.to_function_proto(), f"op {declared.qualified}: body {body.name}"
    allowed = [declared.inputs[:count] for count in range(_fewest(declared), len(declared.inputs) + 1)]
    if tuple(proto.input) not in allowed:
        raise RequestError(f"{name} takes {_listed(proto.input)}; the op has {' or '.join(map(_listed, allowed))}")
    if len(proto.output) != declared.outputs:
        raise RequestError(f"{name} gives {len(proto.output)} outputs; the op has {declared.outputs}")
    wanted = declared.attributes.keys() | lowering.sizes.keys()
    taken = {*proto.attribute, *(attribute.name for attribute in proto.attribute_proto)}
    if not taken <= wanted:
        raise RequestError(f"{name} takes {_listed(sorted(taken - wanted))}; the op has {_listed(sorted(wanted))}")
    if lowering.is_frame and not declared.states:
        raise RequestError(f"{name} is for one frame, and the op has no states; declare them, or leave is_frame out")


def _fewest(declared: DeclaredOp[..., Any]) -> int:
    """Inputs that every body takes."""
    return len(declared.inputs) - len(declared.optional)


def _listed(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"


def _helpers_of(op: Op) -> dict[str, Body]:
    """What the bodies of an op call, and what that calls."""
    found: dict[str, Body] = {}
    waiting = [each.body for each in op.lowerings]
    while waiting:
        for callee in _called(waiting.pop()):
            name = f"{callee.opset.domain}::{callee.name}"
            if name not in found:
                found[name] = callee
                waiting.append(callee)
    return found


def _called(body: Body) -> Iterator[Body]:
    """The functions that a function calls itself."""
    if isinstance(body, OnnxFunction):
        for node in ir.traversal.RecursiveGraphIterator(body.graph()):
            if isinstance(callee := node.meta.get("callee"), OnnxFunction):
                yield callee


def _is_other(held: Body, body: Body) -> bool:
    return held is not body and held.to_function_proto() != body.to_function_proto()
