"""Trace: from a torch module to an abstract graph, in which every edifice op is ONE node of domain `edifice`.

The graph is valid for every size of its free dimensions, or there is none: a declared dimension that became a number,
or a graph that depends on the traced size, is refused.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch import nn

from ..errors import CheckError
from ..specification import DTYPES, InputSpec, OutputSpec, Size, Sizes, TensorSpec
from .capture import check_other_sizes, export_program, quiet, sizes_of
from .names import rename
from .torch_private import decompose_if_needed, forgetting, parsed_once
from .translations import translations

__all__ = ["check_symbolic", "outputs_of", "trace", "translate"]


def trace(
    module: nn.Module,
    inputs: Sequence[InputSpec],
    outputs: Sequence[TensorSpec] | Sequence[str],
    opset: int,
    name: str = "window",
    sizes: Sequence[Sizes] | None = None,
) -> ir.Model:
    """Traces `module` to an abstract graph.

    Node and value names say where in the module they come from: `blocks.0.mamba/selective_scan`.

    Args:
        module: takes the inputs in order and returns the outputs; its parameters become initializers of their name.
        inputs: names and shapes; symbols stay free.
        outputs: names and shapes, checked against the graph's own; or names alone, see outputs_of.
        opset: version of the ONNX operator set.
        name: of the graph.
        sizes: to trace at, and others to compare at; made from the inputs if None.

    Raises:
        CheckError: a free dimension was frozen, or the graph depends on the traced size.
    """
    first, *others = sizes_of(inputs) if sizes is None else sizes
    with _no_collection(), forgetting():
        program = export_program(module, inputs, first)
        check_other_sizes(program, module, inputs, others)
        names = [output if isinstance(output, str) else output.name for output in outputs]
        translated = translate(program, inputs, opset, names)
    assert translated.exported_program is not None
    rename(translated.model, translated.exported_program.graph, inputs, names)
    translated.model.graph.name = name
    declared = [output for output in outputs if isinstance(output, TensorSpec)]
    check_symbolic(translated.model, inputs, declared if len(declared) == len(names) else outputs_of(translated.model))
    return translated.model


def outputs_of(model: ir.Model) -> tuple[OutputSpec, ...]:
    """What a graph gives: types, and sizes in the symbols of what it takes.

    Raises:
        CheckError: a type that no bundle has.
    """
    return tuple(_output(value) for value in model.graph.outputs)


def _output(value: ir.Value) -> OutputSpec:
    shape = tuple(_size(size) for size in value.shape or ())
    name, dtype = value.name or "", value.dtype.numpy().name if value.dtype is not None else "nothing"
    if dtype not in DTYPES:
        raise CheckError(f"the output {name} is {dtype}; give one of {', '.join(DTYPES)}")
    # A free size beside that of the batch: there is a value at every frame, pixel or whatever else there is of them.
    return OutputSpec(name, dtype, shape, "every" if any(isinstance(size, Size) for size in shape[1:]) else "whole")


def translate(
    program: torch.export.ExportedProgram,
    inputs: Sequence[InputSpec],
    opset: int,
    output_names: Sequence[str] = ("output",),
) -> torch.onnx.ONNXProgram:
    """torch's exporter: a torch graph's ONNX graph, and the torch graph in the operators that it was made from.

    The latter may be `program` itself, changed in place: it is not to be translated twice.

    Raises:
        CheckError: there is no such graph in this opset.
    """
    decompose_if_needed(program)
    with quiet(), parsed_once(), _without_form():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations(),
            input_names=[spec.name for spec in inputs],
            output_names=list(output_names),
            verbose=False,
        )
    if translated is None or translated.exported_program is None or translated.model.opset_imports[""] != opset:
        raise CheckError(f"torch's exporter could not make a graph of opset {opset}; try --opset 20")
    return translated


@contextlib.contextmanager
def _without_form() -> Iterator[None]:
    """Says of an operator that torch's exporter has no ONNX form of it."""
    try:
        yield
    except torch.onnx.errors.OnnxExporterError as error:
        text = f"{error} {error.__cause__} {error.__context__}"
        op = re.search(r"aten\.\w+|op='([\w.:]+)'", text)
        what = (op[1] or op[0]) if op is not None else "an operator"
        raise CheckError(
            f"torch's exporter has no ONNX form of {what} for these types and sizes; compute it otherwise, or by an op "
            "of your own, see docs/ops.md"
        ) from error


def check_symbolic(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Refuses a graph whose inputs or outputs differ from what was declared, symbols included.

    Raises:
        CheckError: names the tensor, the declared shape and the graph's.
    """
    for specs, found in ((inputs, model.graph.inputs), (outputs, model.graph.outputs)):
        if len(specs) != len(found):
            raise CheckError(f"the graph has {len(found)} inputs or outputs where {len(specs)} were declared")
        for spec, value in zip(specs, found, strict=True):
            shape = tuple(_size(size) for size in value.shape or ())
            if not _alike(spec, shape):
                raise CheckError(
                    f"{spec.name} was declared [{', '.join(map(str, spec.shape))}] and exported as "
                    f"[{', '.join(map(str, shape))}]: a dimension that should stay free was frozen"
                )


def _size(size: int | ir.SymbolicDim) -> int | Size:
    return size if isinstance(size, int) else Size.parse(size.value or "?")


def _alike(spec: TensorSpec, found: Sequence[int | Size]) -> bool:
    """Whether sizes are as declared. How torch writes other arithmetic than sums is its own affair."""
    return len(spec.shape) == len(found) and all(
        one == two or (isinstance(one, Size) and isinstance(two, Size) and bool(one.other) and bool(two.other))
        for one, two in zip(spec.shape, found, strict=True)
    )


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
