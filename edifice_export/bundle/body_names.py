"""What the bodies of the edifice ops are called in a graph, and so what a kernel for one is registered as.

Each body has a name of its own, the same in every graph: runtimes below 1.27 take overloads of one name for one
another, without a word, and give wrong numbers.
"""

from __future__ import annotations

__all__ = ["body_name", "op_of"]


def body_name(op: str, lowering: str, inputs: int, outputs: int) -> str:
    """The name of a body, such as SelectiveScan_plain_6to1.

    Args:
        op: the op's name.
        lowering: the lowering's, among those of the op.
        inputs: how many it takes.
        outputs: how many it gives: those of the op up to the last that a node reads.
    """
    return f"{op}_{lowering}_{inputs}to{outputs}"


def op_of(name: str) -> str:
    """The op of a body's name, or of any text that starts with one; the name of a helper, which has no such parts."""
    return name.partition("_")[0]
