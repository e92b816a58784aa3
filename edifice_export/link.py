"""Link: attach to an abstract graph the function body of each edifice op it uses."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from .errors import CheckError
from .functions import LOWERINGS
from .functions.domain import EDIFICE

__all__ = ["IR_VERSION", "check", "link"]

IR_VERSION = 10
"""Old enough for runtimes of 2024."""


def link(model: ir.Model) -> onnx.ModelProto:
    """Attaches one body per edifice op.

    Args:
        model: an abstract graph; it is not changed.

    Returns:
        A portable model: standard operators and model-local functions.

    Raises:
        CheckError: an op has no body.
    """
    opset = model.opset_imports[""]
    linked = ir.to_proto(model)
    linked.ir_version = IR_VERSION
    for name in sorted({node.op_type for node in model.graph if node.domain == EDIFICE.domain}):
        if name not in LOWERINGS:
            raise CheckError(f"op {EDIFICE.domain}::{name} has no function body; there are: {', '.join(LOWERINGS)}")
        body = LOWERINGS[name].to_function_proto()
        for node in body.node:
            node.name = node.output[0]  # the variable's name in the function's source
        for version in body.opset_import:
            if version.domain == "":
                version.version = opset
        linked.functions.append(body)
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
