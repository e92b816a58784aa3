"""An op of a user's own, from one decorated function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, Unpack

from edifice_reference.ops.op import DeclaredOp, Facts, declared

from ..arguments import callback, flag, several, text, whole_number
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
        facts: what the op is, see edifice_reference.ops.op.Facts: shapes, streamed, states, axes,
            read_out, reads_one_or_all, sees, ends_with_state, integers, cases.

    Raises:
        RequestError: the name is taken, there are no bodies, or one of them or what is declared doesn't fit.
    """

    text("name", name)
    bodies, prefer = several("bodies", bodies, "onnxscript functions"), callback("prefer", prefer)
    _check_facts(facts)

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


def _check_facts(facts: Facts) -> None:
    """Refuses what is of another type than Facts says; that it fits the definition is for `declared` to find out."""
    callback("shapes", facts.get("shapes"))
    for what in ("streamed", "states", "integers"):
        for name in several(what, facts.get(what, ()), "names"):
            text(f"each of {what}", name)
    for case in several("cases", facts.get("cases", ()), "functions"):
        callback("each of cases", case)
    for what in ("reads_one_or_all", "ends_with_state"):
        flag(what, facts.get(what, False))
    whole_number("axes", facts.get("axes", 3), 2)
    if "read_out" in facts:
        text("read_out", facts["read_out"])
    match facts.get("sees", 1):
        case (str(), int()):
            pass
        case sees:
            whole_number("sees", sees, 1)


_TAKEN = frozenset({"ai", "aten", "com", "edifice", "onnx", "prim", "prims"})
"""Namespaces, or what theirs begin with: of this package, torch, ONNX and runtimes (com.microsoft, ai.onnx)."""
