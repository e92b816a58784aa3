"""An op of a user's own, from one decorated function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, Unpack

from edifice_reference.ops.op import DeclaredOp, Facts, declared

from ..errors import RequestError
from .lowering import Body, Call, Lowering
from .registry import register

__all__ = ["op"]

P = ParamSpec("P")
R = TypeVar("R")


def op(
    name: str,
    *,
    bodies: Sequence[Body | Lowering],
    prefer: Callable[[Call], tuple[str, str]] | None = None,
    **facts: Unpack[Facts],
) -> Callable[[Callable[P, R]], DeclaredOp[P, R]]:
    """Registers an op: modules that call the decorated function export as a graph in which a body stands for it.

        @ee.op("mine::leaky_scan", bodies=[LeakyScan], shapes=shapes, streamed=["x"], states=["initial"])
        def leaky_scan(x: Tensor, decay: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    The function defines the op, in plain torch: it is what bodies are verified against, and what eager code runs. See
    docs/ops.md for an example and for all that can be declared.

    Args:
        name: `namespace::name`, of a namespace of your own.
        bodies: onnxscript functions of the op's inputs, those among them that may be left out or not; as a Lowering
            what is for single frames, or not for every call. A body is called `plain` if it is not a Lowering.
        prefer: of the lowerings that fit a call, the name of the one to take, and why. The first if not given.
        facts: what the op is, see edifice_reference.ops.op.Facts: shapes, streamed, states, read_out,
            reads_one_or_all, sees, ends_with_state, integers, cases.

    Raises:
        RequestError: the name is taken, there are no bodies, or one of them or what is declared doesn't fit.
    """

    def decorate(definition: Callable[P, R]) -> DeclaredOp[P, R]:
        namespace = name.partition("::")[0]
        if namespace.partition(".")[0] in _TAKEN:
            raise RequestError(
                f"op {name}: {namespace} has ops of others; take a namespace of your own, such as mine::"
            )
        try:
            op = declared(name, definition, facts)
        except ValueError as error:
            raise RequestError(str(error)) from error
        register(op, [each if isinstance(each, Lowering) else Lowering("plain", each) for each in bodies], prefer)
        return op

    return decorate


_TAKEN = frozenset({"ai", "aten", "com", "edifice", "onnx", "prim", "prims"})
"""Namespaces, or what theirs begin with: of this package, torch, ONNX and runtimes (com.microsoft, ai.onnx)."""
