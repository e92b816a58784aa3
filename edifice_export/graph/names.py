"""Names: what a graph holds is called by where in the module it comes from, and its free sizes as declared."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from ..errors import CheckError
from ..specification import Size, TensorSpec

__all__ = ["rename", "scoped_names"]


def scoped_names(graph: torch.fx.Graph) -> dict[str, str]:
    """A readable name for every value of a torch graph: its module's path, its operator, and a number if need be."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            # One of several outputs: named after what gives them.
            names[node.name] = f"{names[node.args[0].name]}.{node.args[1]}"
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        scope = stack[-1][0] if stack else ""
        scope = "" if scope.startswith("_empty") else scope  # torch's mark for nodes that tracing itself added
        kind = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        name = f"{scope}/{kind}" if scope else kind
        seen[name] += 1
        names[node.name] = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    return names


def rename(model: ir.Model, traced: torch.fx.Graph, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
    """Gives dimensions their declared symbols and nodes and values the names of where they come from.

    Args:
        model: what torch's exporter made.
        traced: the torch graph that it made it of.
        inputs: as declared, in order.
        outputs: their names.
    """
    if len(model.graph.inputs) != len(inputs):
        raise CheckError(
            f"torch's exporter made a graph of {len(model.graph.inputs)} inputs of a module of {len(inputs)}: an "
            "operator in it wants a size as an input; fix that size, or compute it otherwise"
        )
    scoped = scoped_names(traced)
    symbols = {
        dim.value: str(symbol)
        for spec, value in zip(inputs, model.graph.inputs, strict=True)
        for symbol, dim in zip(spec.shape, value.shape or (), strict=True)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    declared = {*(spec.name for spec in inputs), *outputs}
    # What torch's exporter has folded is called as its node was.
    taken = Counter({*declared, *model.graph.initializers})

    def unique(name: str) -> str:
        found = name
        while taken[found]:
            taken[name] += 1
            found = f"{name}_{taken[name] - 1}"
        taken[found] += 1
        return found

    for node in model.graph:
        node.name = unique(_source(node, scoped))
        node.metadata_props.clear()
        node.doc_string = None
        for index, value in enumerate(node.outputs):
            # Not by name: an inner value may be called as an input is.
            if not value.is_graph_output():
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer() and "." not in (weight.name or ""):
            # torch keeps [out, in]; the exporter has folded the transpose that ONNX's MatMul needs.
            weight.name = unique(f"{node.name.split('/')[0]}.weight_transposed")
    for value in _values(model.graph):
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape([_resymbol(dim, symbols) for dim in value.shape])
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = model.producer_version = None


def _source(node: ir.Node, scoped: Mapping[str, str]) -> str:
    """The scoped name of the torch value that `node` makes, or of the one that it helps to make, and its operator."""
    for name in (node.outputs[0].name or "", (node.name or "").removeprefix("node_")):
        if name in scoped:
            return scoped[name].removesuffix(".0") if len(node.outputs) > 1 else scoped[name]
    traced = re.match(r"%(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
    before = scoped.get(traced[1]) if traced else node.inputs[0].name if node.inputs and node.inputs[0] else None
    return f"{before}/{node.op_type}" if before else node.op_type


def _resymbol(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    named = re.sub(r"\b[a-z]\w*", lambda match: symbols.get(match[0], match[0]), dim.value)
    return ir.SymbolicDim(str(Size.parse(named)))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
