"""Stable forms: operators of torch whose usual translation loses, in float32, just what they are there for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18

__all__ = ["STABLE_FORMS"]

op: Any = opset18


def log_sigmoid(self: Any) -> Any:
    """Such as a decay's logarithm: of a sigmoid near 1, or near 0, the logarithm knows nothing any more."""
    return op.Neg(op.Softplus(op.Neg(self)))


def logaddexp(self: Any, other: Any) -> Any:
    """The larger, and what the distance of the smaller adds."""
    return op.Add(op.Max(self, other), op.Softplus(op.Neg(op.Abs(op.Sub(self, other)))))


def expm1(self: Any) -> Any:
    """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), which keeps small x."""
    half = op.Tanh(op.Mul(self, op.CastLike(op.Constant(value_float=0.5), self)))
    return op.Mul(half, op.Add(op.Exp(self), op.CastLike(op.Constant(value_float=1.0), self)))


def log1p(self: Any) -> Any:
    """Of small x, log(1 + x) = 2 atanh(x / (x + 2))."""
    one, two = (op.CastLike(op.Constant(value_float=number), self) for number in (1.0, 2.0))
    is_small = op.Less(op.Abs(self), op.CastLike(op.Constant(value_float=0.5), self))
    small = op.Where(is_small, self, op.Sub(one, one))
    return op.Where(is_small, op.Mul(two, op.Atanh(op.Div(small, op.Add(small, two)))), op.Log(op.Add(self, one)))


STABLE_FORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.log_sigmoid.default: log_sigmoid,
    torch.ops.aten.logaddexp.default: logaddexp,
    torch.ops.aten.expm1.default: expm1,
    torch.ops.aten.log1p.default: log1p,
}
"""For torch's exporter, by operator."""
