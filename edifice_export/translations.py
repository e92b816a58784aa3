"""Translations: the edifice ops as torch's exporter is to have them, each a node of domain `edifice`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import torch
from onnxscript import values

from edifice_reference import ops

from .functions.domain import EDIFICE

__all__ = ["parsed_once", "translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch's exporter: every edifice op becomes a node of the same name in camel case."""
    overloads = (getattr(getattr(torch.ops, ops.NAMESPACE), name).default for name in ops.OPS)
    return {overload: _translation(overload) for overload in overloads}


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Keeps what onnxscript reads in the source of torch's own translations.

    torch's exporter asks for all of them in every export, and onnxscript parses each anew: a tenth of a build.
    """
    _TRACED.function_ir = property(_parsed)
    try:
        yield
    finally:
        _TRACED.function_ir = _PARSES


_TRACED: Any = values.TracedOnnxFunction
_PARSES = _TRACED.function_ir
_parsed = functools.cache(_PARSES.fget)


def _translation(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    arguments = overload._schema.arguments
    tensors = [argument for argument in arguments if str(argument.type) in _PRESENCE]
    attributes = {argument.name: str(argument.type) for argument in arguments if argument not in tensors}
    name = "".join(part.capitalize() for part in overload._opname.split("_"))
    schema = onnx.defs.OpSchema(
        name,
        EDIFICE.domain,
        EDIFICE.version,
        inputs=[
            onnx.defs.OpSchema.FormalParameter(
                tensor.name, _INTEGERS.get(tensor.name, "T"), param_option=_PRESENCE[str(tensor.type)]
            )
            for tensor in tensors
        ],
        outputs=[
            onnx.defs.OpSchema.FormalParameter(f"output_{index}", "T") for index in range(len(overload._schema.returns))
        ],
        type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
        attributes=[onnx.defs.OpSchema.Attribute(name, _ATTRIBUTES[kind][1]) for name, kind in attributes.items()],
    )
    op = values.Op(EDIFICE, name, schema)

    def translate(*args: Any, **kwargs: Any) -> Any:
        # By name: a schema lists its attributes in alphabetical order, not in the torch op's.
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        found = [given.pop(tensor.name, None) for tensor in tensors]
        return op(*(value for value in found if value is not None), **given)

    # The exporter reads from the signature what is a tensor and what an attribute.
    annotations = {name: _ATTRIBUTES[kind][0] for name, kind in attributes.items()}
    translate.__name__ = name
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


_PRESENCE = {
    "Tensor": onnx.defs.OpSchema.FormalParameterOption.Single,
    "Optional[Tensor]": onnx.defs.OpSchema.FormalParameterOption.Optional,
}
"""Types of torch's schemas that are inputs; optional ones stand last, so that leaving them out moves no other."""

_INTEGERS = {"position": "tensor(int64)"}
"""Inputs that are not of the type that an op computes in."""

_ATTRIBUTES = {"int": (int, onnx.defs.OpSchema.AttrType.INT), "float": (float, onnx.defs.OpSchema.AttrType.FLOAT)}
