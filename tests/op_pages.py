"""The part of docs/ops.md that follows from what is declared: `python tests/op_pages.py` writes it anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from edifice_export.lowerings import LOWERINGS
from edifice_export.lowerings.domain import VERSION
from edifice_export.lowerings.lowering import Op
from edifice_reference.ops.op import NAMESPACE

PAGE = Path(__file__).parents[1] / "docs" / "ops.md"
MARK = "<!-- What follows is written by tests/op_pages.py. -->\n"


def generated() -> str:
    """Of every op of this project its schema, what is declared of it, its bodies, and its docstring."""
    own = sorted((op for op in LOWERINGS.values() if op.domain == NAMESPACE), key=lambda op: op.op_type)
    return "".join(f"\n{line}\n" if line.startswith("#") else f"{line}\n" for op in own for line in _lines(op))


def _lines(op: Op) -> Iterator[str]:
    declared = op.declared
    optional = [f"{name} (optional)" if name in declared.optional else name for name in declared.inputs]
    types = [f"{name}: int64" if name in declared.integers else name for name in optional]
    outputs = ", ".join(["y", *(f"{state} after" for state in declared.states)])
    attributes = ", ".join(f"{name}: {kind}" for name, kind in declared.attributes.items())
    yield f"## {op.op_type}"
    yield ""
    yield f"`{declared.qualified}` in torch, `{op.domain}::{op.op_type}` version {VERSION} in an abstract graph."
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    rows = {
        "inputs": ", ".join(types),
        "attributes": attributes,
        "outputs": outputs,
        "with a sequence axis": ", ".join(declared.streamed),
        "states": ", ".join(declared.states),
        "may be left out, to be zeros": ", ".join(declared.inputs[declared.fresh :]),
        "may be of the last frames alone": _read_out(op),
        "bodies": ", ".join(dict.fromkeys(f"`{each.name}`" for each in op.lowerings)),
    }
    for name, text in rows.items():
        if text:
            yield f"| {name} | {text} |"
    yield ""
    yield "```text"
    yield (inspect.getdoc(declared.definition) or "").strip()
    yield "```"


def _read_out(op: Op) -> str:
    read_out = op.declared.read_out
    if read_out is None:
        return ""
    return f"{read_out}: of one frame or of all" if op.declared.reads_one_or_all else read_out


if __name__ == "__main__":
    written = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(written + MARK + generated(), encoding="utf-8")
