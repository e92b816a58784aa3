"""Trace: from a torch module to an abstract graph, in which every edifice op is ONE node of domain `edifice`.

The graph is valid for every size of its free dimensions, or there is none: a declared dimension that became a number,
or a graph that depends on the traced size, is refused.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import logging
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import nn

from edifice_reference import ops

from .errors import CheckError
from .functions.domain import EDIFICE
from .specification import TensorSpec

__all__ = [
    "check_other_sizes",
    "check_same_graph",
    "check_symbolic",
    "export_program",
    "scoped_names",
    "trace",
    "translate",
]

_TRACED = (2, 7, 13)
"""Sizes of each free dimension in turn, to trace: none of them 0, 1 or equal to another."""

_LARGER, _SMALLER = (3, 11, 17), (5, 3, 4)
"""Sizes to compare: what was frozen may be the most or the least of something."""

_SAME = 1e-5
"""Most that rounding makes of two runs of the same operators, relative to the largest value."""


def trace(
    module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int, name: str = "window"
) -> ir.Model:
    """Traces `module` to an abstract graph.

    Node and value names say where in the module they come from: `blocks.0.mamba/selective_scan`.

    Args:
        module: takes the inputs in order and returns the outputs; its parameters become initializers of their name.
        inputs: names and shapes; symbols stay free.
        outputs: names and shapes, checked against the graph's own.
        opset: version of the ONNX operator set.
        name: of the graph.

    Raises:
        CheckError: a free dimension was frozen, or the graph depends on the traced size.
    """
    with _no_collection():
        program = export_program(module, inputs)
        check_other_sizes(program, module, inputs)
        translated = translate(program, inputs, opset, [spec.name for spec in outputs])
    assert translated.exported_program is not None
    _rename(translated.model, scoped_names(translated.exported_program.graph), inputs, outputs)
    translated.model.graph.name = name
    check_symbolic(translated.model, inputs, outputs)
    return translated.model


def export_program(
    module: nn.Module, inputs: Sequence[TensorSpec], sizes: Sequence[int] = _TRACED
) -> torch.export.ExportedProgram:
    """The torch graph of `module`, traced at one size of the free dimensions.

    Raises:
        CheckError: torch found that a free dimension can't be kept free.
    """
    symbols = _symbols(inputs)
    free = {symbol: torch.export.Dim(symbol) for symbol in symbols}
    dynamic: tuple[Any, ...] = tuple(
        {axis: free[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs
    )
    named = [kind for kind in inspect.signature(module.forward).parameters.values() if kind.kind != kind.VAR_POSITIONAL]
    if len(named) < len(inputs):  # torch takes what *args stand for as one argument
        dynamic = (*dynamic[: len(named)], dynamic[len(named) :])
    with _quiet():
        try:
            return torch.export.export(
                module.eval(), _examples(module, inputs, sizes), dynamic_shapes=dynamic, strict=False
            )
        except (torch._dynamo.exc.UserError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckError(
                f"{type(module).__name__} can't be traced with free dimensions {', '.join(symbols)}: {reason}. Code "
                "that reads a size as a number (a Python loop over time, int(x.shape[1])) freezes it: use an edifice op"
            ) from error


def _symbols(inputs: Sequence[TensorSpec]) -> list[str]:
    return list(dict.fromkeys(dim for spec in inputs for dim in spec.shape if isinstance(dim, str)))


def _examples(module: nn.Module, inputs: Sequence[TensorSpec], sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Random inputs of given sizes; floating point ones in what the module computes in."""
    size_of = dict(zip(_symbols(inputs), sizes, strict=False))
    computed, generator = next(module.parameters()).dtype, torch.Generator().manual_seed(0)
    examples = []
    for spec in inputs:
        shape = [size_of[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        declared: torch.dtype = getattr(torch, spec.dtype)
        if declared.is_floating_point:
            examples.append(torch.randn(shape, generator=generator, dtype=computed))
        else:
            examples.append(torch.randint(max(sizes), shape, generator=generator, dtype=declared))
    return tuple(examples)


def translate(
    program: torch.export.ExportedProgram,
    inputs: Sequence[TensorSpec],
    opset: int,
    output_names: Sequence[str] = ("output",),
) -> torch.onnx.ONNXProgram:
    """torch's exporter: a torch graph's ONNX graph, and the torch graph in the operators that it was made from.

    Raises:
        CheckError: there is no such graph in this opset.
    """
    with _quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=_translations(),
            input_names=[spec.name for spec in inputs],
            output_names=list(output_names),
            verbose=False,
        )
    if translated is None or translated.exported_program is None or translated.model.opset_imports[""] != opset:
        raise CheckError(f"torch's exporter could not make a graph of opset {opset}; try --opset 20")
    return translated


def check_symbolic(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Refuses a graph whose inputs or outputs differ from what was declared, symbols included.

    Raises:
        CheckError: names the tensor, the declared shape and the graph's.
    """
    for specs, found in ((inputs, model.graph.inputs), (outputs, model.graph.outputs)):
        if len(specs) != len(found):
            raise CheckError(f"the graph has {len(found)} inputs or outputs where {len(specs)} were declared")
        for spec, value in zip(specs, found, strict=True):
            shape = tuple(dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape or ())
            if shape != spec.shape:
                raise CheckError(
                    f"{spec.name} was declared [{', '.join(map(str, spec.shape))}] and exported as "
                    f"[{', '.join(map(str, shape))}]: a dimension that should stay free was frozen"
                )


def check_other_sizes(program: torch.export.ExportedProgram, module: nn.Module, inputs: Sequence[TensorSpec]) -> None:
    """Refuses a torch graph that depends on the sizes it was traced at.

    Its values are compared with the module's at larger and at smaller sizes, which takes a tenth of the time of a
    second trace. One follows where they differ, or where there are none: a model may refuse what is beyond its window.

    Raises:
        CheckError: names the first node or constant that differs in a trace at other sizes.
    """
    traced = program.module()
    if not all(_give_the_same(traced, module, _examples(module, inputs, sizes)) for sizes in (_LARGER, _SMALLER)):
        check_same_graph(program, export_program(module, inputs, _LARGER))


def _give_the_same(traced: nn.Module, module: nn.Module, examples: Sequence[torch.Tensor]) -> bool:
    """Whether both give the same values; not so where one refuses the sizes."""
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):
        results = module(*examples), traced(*examples)
        pairs = zip(*([value] if isinstance(value, torch.Tensor) else value for value in results), strict=True)
        return all(_is_same(*pair) for pair in pairs)
    return False


def _is_same(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    finite = wanted[wanted.isfinite()].abs()
    allowed = _SAME * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=allowed, equal_nan=True)


def check_same_graph(first: torch.export.ExportedProgram, second: torch.export.ExportedProgram) -> None:
    """Refuses two traces of one module, at two sizes of its free dimensions, that are not the same graph.

    Raises:
        CheckError: names the first node or constant in which they differ.
    """
    for one, two in zip(_fingerprint(first), _fingerprint(second), strict=False):
        if one != two:
            raise CheckError(
                f"the graph depends on the traced size: {one[0]} {one[1]} of one trace is {two[0]} {two[1]} of the "
                "other, or holds other values. Make nothing from a size that is read as a number"
            )
    counts = [len(program.graph.nodes) for program in (first, second)]
    if counts[0] != counts[1]:
        raise CheckError(f"the graph depends on the traced size: {counts[0]} nodes at one and {counts[1]} at another")


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


def _fingerprint(program: torch.export.ExportedProgram) -> Iterator[tuple[str, ...]]:
    for node in program.graph.nodes:
        yield "node", node.name, node.op, str(node.target), str(node.args), str(node.kwargs)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor):
            content = hashlib.sha256(value.contiguous().numpy(force=True).tobytes()).hexdigest()
            yield "constant", name, str(value.dtype), str(list(value.shape)), content


def _rename(
    model: ir.Model, scoped: Mapping[str, str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Gives dimensions their declared symbols and nodes and values the names of where they come from."""
    symbols = {
        dim.value: str(symbol)
        for spec, value in zip(inputs, model.graph.inputs, strict=True)
        for symbol, dim in zip(spec.shape, value.shape or (), strict=True)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    taken: Counter[str] = Counter()

    def unique(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"

    declared = {spec.name for spec in (*inputs, *outputs)}
    for node in model.graph:
        node.name = unique(_source(node, scoped))
        node.metadata_props.clear()
        node.doc_string = None
        for index, value in enumerate(node.outputs):
            if value.name not in declared:
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
    return ir.SymbolicDim(re.sub(r"\b[a-z]\w*", lambda match: symbols.get(match[0], match[0]), dim.value))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch's exporter: every edifice op becomes a node of the same name in camel case."""
    overloads = (getattr(getattr(torch.ops, ops.NAMESPACE), name).default for name in ops.OPS)
    return {overload: _translation(overload) for overload in overloads}


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from printing what no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from looking for cycles, a sixth of the time: torch makes millions of small objects."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
