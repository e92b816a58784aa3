"""The one place that touches private parts of torch and onnxscript; a test says at once when an upgrade moves them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
import threading
import traceback
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from onnxscript import values
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = [
    "SizeRead",
    "decompose_if_needed",
    "forgetting",
    "parsed_once",
    "place_of",
    "reads_of_sizes",
    "untie",
]


@dataclasses.dataclass(frozen=True)
class SizeRead:
    """A place in somebody's code that turns a free size into a number or a condition.

    Attributes:
        file: of the code.
        line: in it, from 1.
        expression: what was read, in torch's symbols.
        as_number: whether it became a number, which freezes it, and not a condition.
        by_torch: whether an operator of torch wanted to know, and not the code itself.
    """

    file: str
    line: int
    expression: str
    as_number: bool
    by_torch: bool


@contextlib.contextmanager
def reads_of_sizes() -> Iterator[list[SizeRead]]:
    """Notes where code reads a free size while torch traces it in this thread, the first read first."""
    found: list[SizeRead] = []
    _noting.lists.append(found)
    with _watched():
        try:
            yield found
        finally:
            _noting.lists.remove(found)


class _Noting(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[SizeRead]] = []


_noting = _Noting()
_READS = {"guard_int": True, "guard_bool": False}
"""Methods of torch's symbolic sizes that make a number of one, or else a condition; Python and C++ call them."""
_watchers, _lock = 0, threading.Lock()
_unwatched = {method: getattr(SymNode, method) for method in _READS}


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Has torch's symbolic sizes note who reads them, for as long as any thread wants to know."""
    global _watchers
    with _lock:
        _watchers += 1
        for method, as_number in _READS.items():
            setattr(SymNode, method, _noted(_unwatched[method], as_number))
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if not _watchers:
                for method, original in _unwatched.items():
                    setattr(SymNode, method, original)


def _noted(method: Callable[..., Any], as_number: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def noting(node: SymNode, *arguments: Any) -> Any:
        if _noting.lists and not node.is_constant():
            caller = sys._getframe(1)
            frame = _somebodys(caller)
            if frame is not None:
                by_torch = frame is not _beyond(caller, _SYMBOLIC)
                read = SizeRead(frame.f_code.co_filename, frame.f_lineno, str(node.expr), as_number, by_torch)
                for found in _noting.lists:
                    found.append(read)
        return method(node, *arguments)

    return noting


_LIBRARIES = (*(str(Path(module.__file__ or "").parent) for module in (torch, contextlib)), "<")
_OWN = str(Path(__file__).parents[1])
_SYMBOLIC = (str(torch.__file__), str(Path(torch.__file__).parent / "fx/experimental"))
"""Where torch's symbolic sizes themselves are."""


def place_of(error: BaseException) -> tuple[str, int] | None:
    """The file and line of somebody's code in which an error was raised, or that called what raised it."""
    found = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((*_LIBRARIES, _OWN))
    ]
    return found[-1] if found else None


def _somebodys(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is neither torch's nor Python's own, if there is one."""
    return _beyond(frame, _LIBRARIES)


def _beyond(frame: FrameType | None, files: tuple[str, ...]) -> FrameType | None:
    """The innermost frame that is in no file of these beginnings."""
    while frame is not None and frame.f_code.co_filename.startswith(files):
        frame = frame.f_back
    return frame


_TAKEN_WHOLE = {
    torch.ops.aten.chunk.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.sym_size.int,
}
"""Composite operators that torch's exporter has its own translation of."""


def decompose_if_needed(program: torch.export.ExportedProgram) -> None:
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


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Keeps what onnxscript reads in the source of torch's own translations.

    torch's exporter asks for all of them in every export, and onnxscript parses each anew: a tenth of a build.
    """
    _TRACED.function_ir = property(_parsed)
    try:
        yield
    finally:
        _TRACED.function_ir = _PARSES


_TRACED: Any = values.TracedOnnxFunction
_PARSES = _TRACED.function_ir
_parsed = functools.cache(_PARSES.fget)


def untie(program: torch.export.ExportedProgram) -> None:
    """Lets a torch graph be freed with its last reference.

    Its symbolic sizes know the inputs that they are of, which know them in C++, where Python finds no cycle.
    """
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None and mode.shape_env.tracked_fakes:
            mode.shape_env.tracked_fakes.clear()


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Has torch forget the sizes of a trace: its caches, keyed by them, would keep all of it, megabytes a build."""
    try:
        yield
    finally:
        for cached in vars(ShapeEnv).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
