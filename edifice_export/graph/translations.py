"""Translations: the ops as torch's exporter is to have them, each a node of the op's domain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import values

from ..errors import CheckError
from ..lowerings import LOWERINGS
from ..lowerings.domain import VERSION
from ..lowerings.lowering import Op
from .stable_forms import STABLE_FORMS

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch's exporter: every registered op becomes a node of the same name in camel case; see stable_forms."""
    return {**STABLE_FORMS, **{op.declared.registered: _translation(op) for op in LOWERINGS.values()}}


def _translation(op: Op) -> Callable[..., Any]:
    """Of a torch call its node, whose schema is made from torch's."""
    declared, domain = op.declared, values.Opset(op.domain, VERSION)
    arguments = declared.registered._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.name in declared.attributes}
    presence = onnx.defs.OpSchema.FormalParameterOption
    schema = onnx.defs.OpSchema(
        op.op_type,
        domain.domain,
        domain.version,
        inputs=[
            onnx.defs.OpSchema.FormalParameter(
                name,
                "tensor(int64)" if name in declared.integers else "T",
                param_option=presence.Optional if name in declared.optional else presence.Single,
            )
            for name in declared.inputs
        ],
        outputs=[onnx.defs.OpSchema.FormalParameter(f"output_{index}", "T") for index in range(declared.outputs)],
        type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, _ATTRIBUTES[kind][1]) for name, kind in declared.attributes.items()
        ],
    )
    node = values.Op(domain, op.op_type, schema)

    def translate(*args: Any, **kwargs: Any) -> Any:
        # By name: a schema lists its attributes in alphabetical order, not in the torch op's.
        given = defaults | dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        found = [given.pop(name, None) for name in declared.inputs]
        while found and found[-1] is None:
            found.pop()
        if any(value is None for value in found):
            missing = declared.inputs[found.index(None)]
            raise CheckError(
                f"{declared.qualified} is called without {missing} and with {declared.inputs[len(found) - 1]}"
            )
        return node(*found, **given)

    # The exporter reads from the signature what is a tensor and what an attribute.
    annotations = {name: _ATTRIBUTES[kind][0] for name, kind in declared.attributes.items()}
    translate.__name__ = op.op_type
    translate.__annotations__ = annotations
    translate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=annotations.get(argument.name, inspect.Parameter.empty),
            )
            for argument in arguments
        ]
    )
    return translate


_ATTRIBUTES = {"int": (int, onnx.defs.OpSchema.AttrType.INT), "float": (float, onnx.defs.OpSchema.AttrType.FLOAT)}
