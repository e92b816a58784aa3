"""What to tell somebody whose code freezes a free size: where it does, and which op computes the same without."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Sequence
from pathlib import Path

from .torch_private import SizeRead, place_of

__all__ = ["explain"]

_OWN = str(Path(__file__).parents[1])


def explain(module: str, symbols: Sequence[str], error: Exception, reads: Sequence[SizeRead]) -> str:
    """One message: what can't be free, what torch says, the file and line that reads a size, and what to do.

    Args:
        module: the module's class.
        symbols: what was to be free.
        error: torch's.
        reads: where sizes were read while it was traced.
    """
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        return f"{module} decides by the values that it is given{_at(error)}; use torch.where, or torch.cond"
    head = f"{module} can't be traced with free dimensions {', '.join(symbols)}: {_said(error):.300}"
    guilty = [read for read in reads if not read.file.startswith(_OWN)]
    numbers = [read for read in guilty if read.as_number]
    if not guilty:
        return (
            f"{head}. Code that reads a size as a number (a Python loop over time, int(x.shape[1])) freezes it: "
            f"compute with tensors, or use an op of edifice_reference.ops"
        )
    read = (numbers or guilty)[0]
    source = linecache.getline(read.file, read.line).strip()
    what = "as a number" if read.as_number else "for a decision"
    return f"{head}. {read.file}:{read.line} reads a size {what}: `{source}`. {_advice(read)}"


def _at(error: Exception) -> str:
    place = place_of(error)
    if place is None:
        return ""
    return f", in {place[0]}:{place[1]}: `{linecache.getline(*place).strip():.100}`"


def _said(error: Exception) -> str:
    """What torch says: its first line, and its first reason below that."""
    first, *reasons = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    first = first.partition(" For more information")[0]
    return " ".join([first, *(reason.removeprefix("- ") for reason in reasons if reason.startswith("- "))][:2])


def _advice(read: SizeRead) -> str:
    loop = _loop_at(read)
    if loop is None:
        return "Compute with tensors instead, or declare that dimension as fixed"
    return f"A loop over time is frozen at the traced length: {_op_for(loop)}"


def _loop_at(read: SizeRead) -> ast.For | ast.While | None:
    """The innermost loop that the line begins, or whose head it is."""
    try:
        tree = ast.parse("".join(linecache.getlines(read.file)))
    except SyntaxError:
        return None
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.While) and node.lineno <= read.line < node.body[0].lineno
    ]
    return loops[-1] if loops else None


def _op_for(loop: ast.For | ast.While) -> str:
    """The op that says what a loop's body seems to: by what is carried from one turn to the next."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            assigned.setdefault(node.target.id, []).append(ast.BinOp(ast.Name(node.target.id), node.op, node.value))
    carried = [value for name, values in assigned.items() for value in values if name in _names(value)]
    if not carried:
        return "write it as one operation on all frames, such as ops.causal_conv1d or a product"
    text = " ".join(ast.unparse(node) for node in ast.walk(loop) if isinstance(node, ast.stmt))
    if "softmax" in text:
        return "ops.causal_attention and ops.sliding_attention attend over time"
    if any(word in text for word in ("einsum", "@", "matmul", "bmm", "unsqueeze", "None]")):
        return (
            "ops.selective_scan(x, delta, a, b, c) computes h = exp(delta * a) * h + b * x, y = c . h for every frame; "
            "the state of ops.linear_attention and ops.gated_delta_rule is a matrix for each head"
        )
    return "ops.linear_scan(x, log_decay) computes h = exp(log_decay) * h + x for every frame"


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
