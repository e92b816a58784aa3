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
import warnings
from collections.abc import Container, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import CheckError
from ..specification import TensorSpec
from .names import rename
from .translations import parsed_once, translations

__all__ = [
    "check_other_sizes",
    "check_same_graph",
    "check_symbolic",
    "export_program",
    "trace",
    "translate",
]

_TRACED = (2, 7, 13)
"""Sizes of each free dimension in turn, to trace: none of them 0, 1 or equal to another."""

_LARGER, _SMALLER = (3, 11, 17), (5, 3, 4)
"""Sizes to compare: what was frozen may be the most or the least of something."""

_TAKEN_WHOLE = {
    torch.ops.aten.chunk.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.sym_size.int,
}
"""Composite operators that torch's exporter has its own translation of."""

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
    with _no_collection(), _forgetting():
        program = export_program(module, inputs)
        check_other_sizes(program, module, inputs)
        translated = translate(program, inputs, opset, [spec.name for spec in outputs])
    assert translated.exported_program is not None
    rename(translated.model, translated.exported_program.graph, inputs, outputs)
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
            program = torch.export.export(
                module.eval(), _examples(module, inputs, sizes), dynamic_shapes=dynamic, strict=False
            )
        except (torch._dynamo.exc.UserError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckError(
                f"{type(module).__name__} can't be traced with free dimensions {', '.join(symbols)}: {reason}. Code "
                "that reads a size as a number (a Python loop over time, int(x.shape[1])) freezes it: use an edifice op"
            ) from error
    _untie(program)
    return program


def _untie(program: torch.export.ExportedProgram) -> None:
    """Lets a torch graph be freed with its last reference.

    Its symbolic sizes know the inputs that they are of, which know them in C++, where Python finds no cycle.
    """
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None and mode.shape_env.tracked_fakes:
            mode.shape_env.tracked_fakes.clear()


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

    The latter may be `program` itself, changed in place: it is not to be translated twice.

    Raises:
        CheckError: there is no such graph in this opset.
    """
    _decompose_if_needed(program)
    with _quiet(), parsed_once():
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


def _decompose_if_needed(program: torch.export.ExportedProgram) -> None:
    """Lets torch's exporter decompose `program` only where it has something to decompose.

    torch traces the program again for it, a quarter of the time of a build. Of operators that have no decomposition,
    or are left whole, and that change none of their inputs, it would make the same graph again.
    """
    decompose = program.run_decompositions

    def run(table: dict[Any, Any] | None = None) -> torch.export.ExportedProgram:
        targets = (node.target for node in program.graph.nodes if node.op == "call_function")
        # Without a table torch decomposes by one of its own.
        as_it_is = table is not None and all(_stays(target, table) for target in targets)
        return program if as_it_is else decompose(table)

    program.run_decompositions = run


def _stays(target: Any, table: Container[Any]) -> bool:
    """Whether decomposing by this table leaves an operator, or one that the exporter takes, as it is."""
    if target is operator.getitem or target in _TAKEN_WHOLE:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target in table:
        return False
    return not target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


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


def _fingerprint(program: torch.export.ExportedProgram) -> Iterator[tuple[str, ...]]:
    for node in program.graph.nodes:
        yield "node", node.name, node.op, str(node.target), str(node.args), str(node.kwargs)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor):
            content = hashlib.sha256(value.contiguous().numpy(force=True).tobytes()).hexdigest()
            yield "constant", name, str(value.dtype), str(list(value.shape)), content


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
def _forgetting() -> Iterator[None]:
    """Has torch forget the sizes of this trace: its caches, keyed by them, would keep all of it, megabytes a build."""
    try:
        yield
    finally:
        for cached in vars(ShapeEnv).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()


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
