"""Plan: at which points a bundle is measured. What was asked for is refused here, before anything is measured."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

from ..arguments import several, text, whole_number, words
from ..building.build import BUILDS
from ..bundle.bundle import Bundle
from ..bundle.manifest import ARCHITECTURE
from ..errors import RequestError
from ..machine import physical_memory
from ..runtime.providers import MAX_THREADS

__all__ = ["AGAINST", "PREFILL", "Point", "check_against", "check_rounds", "plan"]

AGAINST = ("eager", "compile", "plain-onnx")
"""The alternatives that a bundle can be measured beside, see alternatives."""

PREFILL = 8
"""Frames of a piece that is prefilled: what going back by so many and on again costs."""

_MAX_THREADS = 4
_BATCHES = (1, 8)
_LONG_WINDOW = 256
"""Windows up to this size are measured at four times their length too, unless lengths are asked for."""

_SCORES, _ACTIVATIONS = 3, 32
"""Copies of the attention scores, and of the residual stream, that are in memory at once; roughly."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Where something is measured: a graph of the bundle, threads within an operator, and the sizes of its input."""

    graph: str
    threads: int
    batch: int
    length: int


def plan(
    bundle: Bundle,
    graph: str,
    threads: Sequence[int] | None,
    batch: Sequence[int] | None,
    length: Sequence[int] | None,
    against: Sequence[str],
) -> list[Point]:
    """The points, each once: the first of all values, and from there one of them varied at a time.

    Args:
        bundle: what is measured.
        graph: `window`, `stream` or `both`.
        threads: within an operator; if None, 1 and the processors that there are, at most _MAX_THREADS.
        batch: if None, _BATCHES.
        length: frames of a window; if None, the bundle's window and lengths around it.
        against: alternatives, see AGAINST. Some take minutes to make for each point: beside them, only the first of the
            default values is measured.

    Raises:
        RequestError: a graph that the bundle does not have, a number out of range, a length beyond what the graph can
            compute, an input for which there is not enough memory.
    """
    wanted = _graphs(bundle, graph, length, against)
    slow = "compile" in against or "plain-onnx" in against

    def values(what: str, asked: Sequence[int] | None, default: Sequence[int], maximum: float = math.inf) -> list[int]:
        given = default[: 1 if slow else None] if asked is None else several(what, asked, "integers")
        if not given:
            raise RequestError(f"{what}: the list is empty; name at least one, or leave it out")
        return list(dict.fromkeys(whole_number(what, value, 1, maximum) for value in given))

    threads = values("threads", threads, (1, min(os.cpu_count() or 1, _MAX_THREADS)), MAX_THREADS)
    batch = values("batch", batch, _BATCHES)
    points = []
    if length is not None and bundle.manifest.frames is None:
        sizes = ", ".join(f"{symbol} {size}" for symbol, size in bundle.manifest.sizes.items())
        raise RequestError(f"length: this bundle has no frames; it is measured at {sizes}; leave it out")
    if "window" in wanted:
        length = values("length", length, _lengths(bundle))
        _check_length(bundle, max(length))
        points += _vary("window", threads, batch, length)
    if "stream" in wanted:
        points += _vary("stream", threads, batch, [1])
        if "prefill" in bundle.manifest.graphs:
            points.append(Point("prefill", threads[0], batch[0], PREFILL))
    for point in points:
        _check_memory(bundle, point)
    return points


def check_against(against: Sequence[str]) -> list[str]:
    """The alternatives, each once.

    Raises:
        RequestError: there is no such alternative.
    """
    names = words("against", against)
    for name in names:
        if name not in AGAINST:
            raise RequestError(f"against {name!r}: there is no such alternative; there are {', '.join(AGAINST)}")
    return list(dict.fromkeys(names))


def check_rounds(rounds: int | None) -> None:
    """Refuses what is no number of rounds.

    Raises:
        RequestError: says so.
    """
    if rounds is not None:
        whole_number("rounds", rounds, 1, 1_000_000)


def _graphs(bundle: Bundle, graph: str, length: Sequence[int] | None, against: Sequence[str]) -> list[str]:
    text("graph", graph, BUILDS)
    there: list[str] = [name for name in ("window", "stream") if name in bundle.manifest.graphs]
    wanted = there if graph == "both" else [graph]
    for name in wanted:
        if name not in there:
            raise RequestError(f"--graph {name}: bundle {bundle.path} has no {name} graph; leave --graph out")
    of_windows = ["length"] if length is not None else []
    of_windows += [f"against {name}" for name in against if name != "eager"]
    if of_windows and "window" not in wanted:
        raise RequestError(f"{of_windows[0]}: is for windows, and only the stream is measured here; leave it out")
    return wanted


def _lengths(bundle: Bundle) -> list[int]:
    window = bundle.manifest.window_size
    if bundle.manifest.program.kind != ARCHITECTURE:
        return [window]
    limited = bundle.manifest.max_frames("window") is not None
    beyond = [] if limited or window > _LONG_WINDOW else [4 * window]
    return [window, math.ceil(window / 4), *beyond]


def _check_length(bundle: Bundle, length: int) -> None:
    limit = bundle.manifest.max_frames("window")
    if limit is not None and length > limit:
        raise RequestError(
            f"length {length}: this graph computes at most {limit} frames; ask for less, or build it with a larger "
            "window_size"
        )


def _check_memory(bundle: Bundle, point: Point) -> None:
    """Refuses what would take more memory than there is; roughly, for no graph says how much it takes."""
    options, memory = bundle.manifest.program.options, physical_memory()
    if bundle.manifest.program.kind != ARCHITECTURE:
        return  # of which nothing is known; the inputs are of the sizes of its example
    scores = _SCORES * options.get("num_heads", 0) * point.length if point.graph == "window" else 0
    state = sum(math.prod(spec.of(1)) for spec in bundle.manifest.states)
    numbers = point.length * (scores + _ACTIVATIONS * options["hidden_size"]) + (
        state if point.graph != "window" else 0
    )
    needed = 4 * point.batch * numbers
    if memory is not None and needed > memory:
        raise RequestError(
            f"batch {point.batch} of {point.length} frames: takes about {needed / 2**30:,.0f} GiB of memory and this "
            f"machine has {memory / 2**30:,.0f}; ask for less"
        )


def _vary(graph: str, threads: Sequence[int], batch: Sequence[int], length: Sequence[int]) -> list[Point]:
    return [
        *(Point(graph, count, batch[0], length[0]) for count in threads),
        *(Point(graph, threads[0], count, length[0]) for count in batch[1:]),
        *(Point(graph, threads[0], batch[0], count) for count in length[1:]),
    ]
