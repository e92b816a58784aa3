"""Inline: the nodes of bodies in the place of the nodes that call them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from ..bundle.manifest import BODY, CALL, LOWERING
from ..passes.fold_constants import fold_constants
from .link import say_shapes_once

__all__ = ["inline"]


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Makes a plain graph of a linked one: standard operators, no function, the same values under the same names.

    Each node of a body says which call it is a part of, in the metadata CALL and BODY, and why that body was chosen.
    Constants, and what bodies make of constants alone, are initializers, which is where other tools look for weights.
    """
    plain = ir.from_proto(model)
    for node in plain.graph:
        if LOWERING in node.metadata_props:  # which the pass gives to all nodes of the body
            node.metadata_props.update({CALL: node.name or "", BODY: node.op_type})
    InlinePass()(plain)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(plain)
    fold_constants(plain)
    called = {node.domain for node in plain.graph.all_nodes()}
    for domain in plain.opset_imports.keys() - called - {""}:
        del plain.opset_imports[domain]
    inlined = ir.to_proto(plain)
    say_shapes_once(inlined)
    return inlined
