"""Plot: how the time of a window grows with its length, and how the times of a frame are spread, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError, brief
from ..writing.files import check_output, replacing
from .results import BenchReport, BenchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "draw_frames", "draw_lengths", "draw_memory", "new_figure", "plot", "save"]

_COLOURS = ("tab:blue", "tab:cyan", "black", "tab:purple", "dimgray", "tab:orange", "tab:red", "tab:green")
_ORDER = ("bundle", "step", "products", "ort-products", "gemv", "eager", "compile", "plain-onnx")


def check_plot(path: Path) -> None:
    """Refuses a plot that could not be drawn, before anything is measured for it.

    Raises:
        RequestError: matplotlib is not installed, or the path is no place for a .png file.
    """
    new_figure(1, 1)
    if path.suffix.lower() != ".png":
        raise RequestError(f"a plot is a .png file; {path} has the extension {path.suffix!r}; name it *.png")
    check_output(path)
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path}: is no place for a file; name a file in a folder that exists")


def plot(report: BenchReport, path: Path) -> None:
    """See BenchReport.plot."""
    check_plot(path)
    drawn = [draw for draw, graph in ((draw_lengths, "window"), (draw_frames, "stream")) if _has(report, graph)]
    figure = new_figure(len(drawn), 1)
    for index, draw in enumerate(drawn):
        draw(figure.add_subplot(1, len(drawn), index + 1), report)
    figure.suptitle(f"{report.title}, {report.machine['cpu']}", fontsize=10)
    save(figure, path)


def new_figure(columns: int, rows: int) -> Figure:
    """An empty figure with room for so many plots.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(
            f"a plot needs matplotlib, which can't be imported here ({brief(error)}); install it with "
            "`pip install matplotlib`"
        ) from error
    # No window, and no state that another figure of the program would share.
    return Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure.

    Raises:
        RequestError: the file can't be written.
    """
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def draw_lengths(axes: Axes, report: BenchReport) -> None:
    """The median time of a window against its length, each contestant a line, on logarithmic scales."""
    for results, colour in _lines(report, "window"):
        label, lengths = results[0].contestant, [result.length for result in results]
        axes.loglog(lengths, [result.median_ms for result in results], "o-", color=colour, label=label)
    _describe(axes, f"window, {_sizes(report, 'window')}", "frames", "milliseconds, median")


def draw_memory(axes: Axes, report: BenchReport) -> None:
    """By how much the first run of a window makes a process grow, against its length, on logarithmic scales."""
    for results, colour in _lines(report, "window"):
        known = [(result.length, result.peak_bytes / 2**20) for result in results if result.peak_bytes]
        if known:
            axes.loglog(*zip(*known, strict=True), "o-", color=colour, label=results[0].contestant)
    _describe(axes, f"window, {_sizes(report, 'window')}", "frames", "memory of the first run, MiB")


def draw_frames(axes: Axes, report: BenchReport) -> None:
    """Of the times of a frame, the share that is no longer than so many milliseconds."""
    for results, colour in _lines(report, "stream"):
        times = np.sort(results[0].times)
        shares = np.arange(1, len(times) + 1) / len(times)
        axes.semilogx(times, shares, color=colour, label=results[0].contestant)
    _describe(axes, f"one frame, {_sizes(report, 'stream')}", "milliseconds", "share of the frames")


def _has(report: BenchReport, graph: str) -> bool:
    return any(result.graph == graph for result in report.results)


def _first(report: BenchReport, graph: str) -> BenchResult:
    return next(result for result in report.results if result.graph == graph)


def _sizes(report: BenchReport, graph: str) -> str:
    first = _first(report, graph)
    return f"batch {first.batch}, {first.threads} thread{'s' * (first.threads > 1)}"


def _lines(report: BenchReport, graph: str) -> list[tuple[list[BenchResult], str]]:
    """Of each contestant, the results that differ from the first in length alone, by length, and its colour."""
    first, lines = _first(report, graph), []
    for name, colour in zip(_ORDER, _COLOURS, strict=True):
        found = [
            result
            for result in report.results
            if (result.graph, result.contestant) == (graph, name)
            and (result.threads, result.batch) == (first.threads, first.batch)
        ]
        if found:
            lines.append((sorted(found, key=lambda result: result.length), colour))
    return lines


def _describe(axes: Axes, title: str, across: str, up: str) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set(title=title, xlabel=across, ylabel=up)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
