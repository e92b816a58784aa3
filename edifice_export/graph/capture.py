"""Capture: a torch module as torch's own graph, free in every declared size, or an error that says what froze it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CheckError
from ..specification import InputSpec, Size, Sizes
from ..values import draw
from .frozen_sizes import explain
from .torch_private import reads_of_sizes, untie

__all__ = [
    "check_other_sizes",
    "check_same_graph",
    "examples",
    "export_program",
    "quiet",
    "sizes_of",
]

_TRACED, _LARGER, _SMALLER = (2, 7, 13, 17, 23), (3, 11, 17, 29, 31), (5, 3, 4, 7, 6)
"""Sizes of the free dimensions in turn, to trace and to compare: none of them 0, 1 or equal to another. What was frozen
may be the most or the least of something."""

_SAME = 1e-5
"""Most that rounding makes of two runs of the same operators, relative to the largest value."""


def sizes_of(inputs: Sequence[InputSpec]) -> tuple[Sizes, ...]:
    """Sizes to trace inputs at, and then others to compare at, where nothing is known of what a module refuses."""
    symbols = list(dict.fromkeys(symbol for spec in inputs for symbol in spec.symbols))
    return tuple(
        dict(zip(symbols, itertools.chain(numbers, itertools.count(37 + 2 * index)), strict=False))
        for index, numbers in enumerate((_TRACED, _LARGER, _SMALLER))
    )


def export_program(
    module: nn.Module, inputs: Sequence[InputSpec], sizes: Sizes | None = None
) -> torch.export.ExportedProgram:
    """The torch graph of `module`, traced at one size of the free dimensions.

    Raises:
        CheckError: a free dimension can't be kept free, and where in the code that is.
    """
    free = {symbol: torch.export.Dim(symbol) for spec in inputs for symbol in spec.symbols}
    given = examples(module, inputs, sizes_of(inputs)[0] if sizes is None else sizes)
    refused: Exception | None = None
    with quiet(), reads_of_sizes() as reads:
        # Torch guards against sizes for which memory would be laid out otherwise, such as 1, which is nothing to a
        # graph. It may put these off, or, where sizes are its own to relate, forget them. What code itself decides by a
        # size it may not forget.
        for dims, put_off in ((free, False), (free, True), (dict.fromkeys(free, torch.export.Dim.AUTO), True)):
            if dims is not free and any(read.as_number or not read.by_torch for read in reads):
                break
            try:
                # torch prints its own account of what it can't trace.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    program = torch.export.export(
                        module.eval(),
                        given,
                        dynamic_shapes=_dynamic(module, inputs, dims),
                        strict=False,
                        prefer_deferred_runtime_asserts_over_guards=put_off,
                    )
            except Exception as error:  # whatever tracing somebody's code raises
                refused = refused or error
            else:
                untie(program)
                if _is_free(program, inputs):
                    return program
    assert refused is not None, "torch freezes no size that has a name"
    raise CheckError(explain(type(module).__name__, list(free), refused, reads)) from refused


def _dynamic(module: nn.Module, inputs: Sequence[InputSpec], dims: Mapping[str, Any]) -> tuple[Any, ...]:
    """The free axes of every input, as torch takes them."""
    dynamic: tuple[Any, ...] = tuple(
        {axis: dims[str(size)] for axis, size in enumerate(spec.shape) if isinstance(size, Size)} for spec in inputs
    )
    named = [kind for kind in inspect.signature(module.forward).parameters.values() if kind.kind != kind.VAR_POSITIONAL]
    if len(named) < len(inputs):  # torch takes what *args stand for as one argument
        dynamic = (*dynamic[: len(named)], dynamic[len(named) :])
    return dynamic


def _is_free(program: torch.export.ExportedProgram, inputs: Sequence[InputSpec]) -> bool:
    """Whether no declared size became a number."""
    nodes = {node.name: node for node in program.graph.nodes}
    return all(
        isinstance(found, torch.SymInt)
        for name, spec in zip(program.graph_signature.user_inputs, inputs, strict=True)
        for found, size in zip(nodes[str(name)].meta["val"].shape, spec.shape, strict=True)
        if isinstance(size, Size)
    )


def examples(module: nn.Module, inputs: Sequence[InputSpec], sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Random inputs of given sizes; floating point ones in what the module computes in."""
    generator = np.random.default_rng(0)
    computed = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    drawn = [torch.from_numpy(draw(spec, sizes, generator)) for spec in inputs]
    # Half precision inputs of a module in float32 are its own affair.
    exact = computed == torch.float64
    return tuple(tensor.double() if exact and tensor.is_floating_point() else tensor for tensor in drawn)


def check_other_sizes(
    program: torch.export.ExportedProgram, module: nn.Module, inputs: Sequence[InputSpec], others: Sequence[Sizes]
) -> None:
    """Refuses a torch graph that depends on the sizes it was traced at.

    Its values are compared with the module's at larger and at smaller sizes, which takes a tenth of the time of a
    second trace. One follows where they differ, or where there are none: a model may refuse what is beyond its window.

    Raises:
        CheckError: names the first node or constant that differs in a trace at other sizes; or the size of nothing, or
            of one, for which code does something else.
    """
    traced = program.module()
    differ = [sizes for sizes in others if not _give_the_same(traced, module, examples(module, inputs, sizes))]
    if differ:
        check_same_graph(program, export_program(module, inputs, others[0]))
    for sizes in differ:
        few = [f"{symbol} {size}" for symbol, size in sizes.items() if size < 2]
        if few:  # torch traces as if there were more
            raise CheckError(
                f"{type(module).__name__} does something else at {', '.join(few)} than the graph of larger sizes: let "
                "the same code compute all of them, without a decision by the size"
            )


def _give_the_same(traced: nn.Module, module: nn.Module, given: Sequence[torch.Tensor]) -> bool:
    """Whether both give the same values; not so where one refuses the sizes."""
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):
        results = module(*given), traced(*given)
        pairs = zip(*([value] if isinstance(value, torch.Tensor) else value for value in results), strict=True)
        return all(_is_same(*pair) for pair in pairs)
    return False


def _is_same(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
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
def quiet() -> Iterator[None]:
    """Keeps torch's exporter from printing what no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
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
