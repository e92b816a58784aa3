"""What has the right type in a manifest and can't be: graphs that take something else, files that are too large."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from edifice_reference.models.config import MAX_WINDOW, NUMERICS

from ..errors import CheckError
from ..machine import physical_memory
from ..specification import BATCH, PAST, SEQUENCE, InputSpec, OutputSpec, Size, TensorSpec
from .file_limits import file_limits
from .manifest import ARCHITECTURE, GRAPHS, MODULE, GraphEntry, Manifest, plain

__all__ = ["check_meaning"]

Error = Callable[[str], CheckError]

_MAX_SETS = 16
"""Test data sets of a graph."""


def check_meaning(manifest: Manifest, error: Error) -> None:
    """Refuses what has the right type and can't be.

    Args:
        manifest: every field of which is of its type.
        error: makes the error that says what is wrong, and with which bundle.

    Raises:
        CheckError: that.
    """
    program = manifest.program
    if program.kind == ARCHITECTURE:
        _check_architecture(manifest, error)
    elif program.kind != MODULE:
        raise error(f"the program's kind {program.kind!r:.60} is not {ARCHITECTURE} or {MODULE}")
    elif program.options or program.numerics is not None or manifest.reference is not None:
        raise error("a module has no options, no numerics and no reference, and this one has")
    if manifest.frames is not None and manifest.frames not in manifest.sizes:
        raise error(f"frames is {manifest.frames!r:.60}, which is none of the sizes")
    tolerance = manifest.parity["tolerance"]
    if not 0 < tolerance < math.inf:
        raise error(f"the tolerance {tolerance} is not positive")
    _check_graphs(manifest, error)
    _check_files(manifest, error)


def _check_architecture(manifest: Manifest, error: Error) -> None:
    program = manifest.program
    if program.numerics not in NUMERICS:
        raise error(f"numerics {program.numerics!r:.60} is not {' or '.join(NUMERICS)}")
    if manifest.reference is None:
        raise error("an architecture has weights of its reference, and this one has none")
    window = program.options["window_size"]
    if not 1 <= window <= MAX_WINDOW:
        raise error(f"window_size {window} is not 1 to {MAX_WINDOW}")
    wanted = {str(BATCH): 1, str(SEQUENCE): window}
    if manifest.sizes != wanted or manifest.frames != str(SEQUENCE):
        raise error(
            f"sizes should be {wanted}, and frames {str(SEQUENCE)!r}, for a window_size of {window}, and are "
            f"{manifest.sizes!s:.80} and {manifest.frames!r:.60}"
        )


def _check_files(manifest: Manifest, error: Error) -> None:
    """Refuses a file that is needed and not listed, and files that are larger than they can be."""
    limits = file_limits(manifest)
    for path in limits:
        if path not in manifest.files:
            raise error(f"{path!r} is used and not listed under files")
    for path in limits.keys() & manifest.files.keys():
        if manifest.files[path].size > limits[path]:
            raise error(
                f"{path!r} should have {manifest.files[path].size} bytes, and for this model, on this machine, it can "
                f"have {limits[path]} at most"
            )
    others = sum(entry.size for path, entry in manifest.files.items() if path not in limits)
    if others > sum(limits.values()):
        raise error(f"files that the bundle doesn't need should have {others} bytes, more than those it needs")
    states = 8 * sum(math.prod(state.of(1)) for state in manifest.states)
    if states > (physical_memory() or math.inf):
        raise error(f"the states of a stream take {states} bytes, more than this machine has")


def _check_graphs(manifest: Manifest, error: Error) -> None:
    """Refuses graphs that take or give something else than graphs of their names do."""
    found = tuple(name for name in GRAPHS if name in manifest.graphs)
    possible = [GRAPHS[:1], GRAPHS[1:], GRAPHS]
    if manifest.program.kind == MODULE:  # which may have no way to take several frames at once
        possible += [GRAPHS[1:2], GRAPHS[:2]]
    if set(manifest.graphs) != set(found) or found not in possible:
        raise error(f"the graphs should be {', '.join(GRAPHS)}, or a part, and are {', '.join(manifest.graphs)}")
    names = [state.name for state in manifest.states]
    if len(set(names)) != len(names) or bool(names) != ("stream" in manifest.graphs):
        raise error("the states should be those of a stream graph, each once")
    for state in manifest.states:
        batch, *sizes = state.shape or (0,)
        free = [size for size in sizes if isinstance(size, Size)]
        symbol = batch.symbol if isinstance(batch, Size) else None
        if symbol not in manifest.sizes or symbol == str(PAST) or free not in ([], [PAST]):
            raise error(f"the state {state.past} should be [{BATCH}, sizes], of which one may be {PAST}")
        if free and (str(PAST) not in manifest.sizes or isinstance(state.initial, str)):
            raise error(
                f"the state {state.name} grows from nothing: it needs the size {PAST}, and no file to start from"
            )
    for name, graph in manifest.graphs.items():
        if not graph.test_data:
            raise error(f"the {name} graph has no test_data")
        if len(graph.test_data) > _MAX_SETS:
            raise error(f"the {name} graph has {len(graph.test_data)} sets of test_data, more than {_MAX_SETS}")
        _check_tensors(manifest, error, name, graph)
        if manifest.program.kind == ARCHITECTURE:
            _check_signature(manifest, error, name, graph)
        _check_states(manifest, error, name, graph)
        _check_test_sequence(manifest, error, name, graph)


def _check_tensors(manifest: Manifest, error: Error, name: str, graph: GraphEntry) -> None:
    """Refuses tensors that no graph has: sizes of which nothing is known, values that their type can't hold."""
    every = (*graph.inputs, *graph.outputs)
    if not graph.inputs or not graph.outputs or len({spec.name for spec in every}) != len(every):
        raise error(f"the {name} graph should have inputs and outputs, each name once")
    for spec in graph.inputs:
        if any(isinstance(size, Size) and size.symbol not in manifest.sizes for size in spec.shape):
            raise error(f"the {name} graph's input {spec} has a size that is none of {', '.join(manifest.sizes)}")
    if not manifest.sizes.keys() >= graph.limits.keys():
        raise error(f"the {name} graph has limits of {', '.join(graph.limits)}, not all of them sizes")
    given = {symbol for spec in graph.inputs for symbol in spec.symbols}
    for output in graph.outputs:
        if not given.issuperset(output.symbols):
            raise error(f"the {name} graph's output {output} has a size that none of its inputs has")


def _check_states(manifest: Manifest, error: Error, name: str, graph: GraphEntry) -> None:
    """Refuses a graph with states whose last inputs and outputs are not these; and others that have any."""
    past, present = manifest.carried(name)
    for kind, tensors, wanted in (("input", graph.inputs, past), ("output", graph.outputs, present)):
        own = len(tensors) - len(wanted)
        if own < 1 or list(map(str, tensors[own:])) != list(map(str, wanted)):
            raise error(f"the {name} graph's last {kind}s should be {', '.join(map(str, wanted))}")


def _check_signature(manifest: Manifest, error: Error, name: str, graph: GraphEntry) -> None:
    past, present = manifest.carried(name)
    free = (BATCH,) if name == "stream" else (BATCH, SEQUENCE)
    first = "frame" if name == "stream" else "state_sequence"
    for kind, tensors, expected, carried in (
        ("input", graph.inputs, InputSpec(first, "float32", free), past),
        ("output", graph.outputs, OutputSpec("output", "float32", (BATCH,), "last"), present),
    ):
        width = tensors[0].shape[-1] if tensors else None
        wanted = (dataclasses.replace(expected, shape=(*expected.shape, width or 1)), *carried)
        if not isinstance(width, int) or list(map(str, tensors)) != list(map(str, wanted)):
            raise error(
                f"the {name} graph's {kind}s should be {', '.join(map(str, wanted))}, found "
                f"{', '.join(map(str, tensors)) or 'nothing'}"
            )
        for tensor, right in zip(tensors, wanted, strict=True):
            if tensor != right:
                raise error(f"{tensor.name} of the {name} graph should be {plain(right)}, and is {plain(tensor)}")


def _check_test_sequence(manifest: Manifest, error: Error, name: str, graph: GraphEntry) -> None:
    """Refuses a longer test that is not one of frames and the output at each."""
    entry, frames = graph.test_sequence, Size((manifest.frames or str(SEQUENCE),))
    if entry is None:
        return
    first: list[TensorSpec] = [spec for specs in manifest.own_tensors(name) for spec in specs]
    wanted = [spec.framed(frames) for spec in first]
    found = [*entry.inputs, *entry.outputs]
    if name != "stream" or list(map(str, found)) != list(map(str, wanted)):
        raise error(
            f"the test_sequence of the {name} graph should be {', '.join(map(str, wanted))} of a stream, and is "
            f"{', '.join(map(str, found)) or 'nothing'}"
        )
