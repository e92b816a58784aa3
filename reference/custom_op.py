"""How an op is registered with torch: from its definition, under this project's namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "edifice_op"]

NAMESPACE = "edifice"

_Shapes = Callable[..., Sequence[Sequence[Any]]]


def edifice_op(
    shapes: _Shapes = lambda first, *_: [first.shape], streamed: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a definition as `edifice::<its name>`.

    Args:
        shapes: from the arguments, the shape of each output; all have the dtype of the first argument.
        streamed: the arguments that have a sequence axis, of an op that takes one frame in place of a sequence.
    """

    def register(definition: Callable[..., Any]) -> Callable[..., Any]:
        define = _with_frames(definition, streamed) if streamed else definition
        op = torch.library.custom_op(f"{NAMESPACE}::{definition.__name__}", define, mutates_args=())

        @op.register_fake
        def _(*inputs: Any) -> Any:
            outputs = [inputs[0].new_empty(shape) for shape in shapes(*inputs)]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        op.register_autograd(functools.partial(_backward, define), setup_context=_setup_context)
        return op

    return register


def _with_frames(definition: Callable[..., Any], streamed: Sequence[str]) -> Callable[..., Any]:
    """The definition for sequences, and for one frame as a sequence of one."""
    names = list(definition.__annotations__)

    @functools.wraps(definition)
    def define(*inputs: Any) -> Any:
        if inputs[0].ndim != 2:
            return definition(*inputs)
        y, *states = definition(
            *(value.unsqueeze(1) if name in streamed else value for name, value in zip(names, inputs, strict=False))
        )
        return y.squeeze(1), *states

    return define


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.constants = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _backward(define: Callable[..., Any], ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    # The definition is run again under autograd: one mathematics, no gradient formula to keep in step with it.
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    inputs = [next(tensors).detach() if tensor else next(constants) for tensor in ctx.is_tensor]
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
    with torch.enable_grad():
        for index in wanted:
            inputs[index].requires_grad_()
        found = define(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in used],
            [inputs[index] for index in wanted],
            [gradient for _, gradient in used],
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for index, value in zip(wanted, found, strict=True):
        result[index] = value
    return tuple(result)
