"""Results: what was measured, and where."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.doctor import installed

__all__ = ["BenchReport", "BenchResult", "folder_of", "machine"]

_PACKAGES = ("edifice-export", "onnxruntime", "torch", "numpy")


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one contestant took at one point.

    Attributes:
        graph: of the bundle, whose work was done: `window`, `stream` (a frame), `prefill` (a few frames of a stream).
        contestant: who did it, see contestants and alternatives.
        threads: within an operator.
        batch: windows or streams side by side.
        length: frames of each.
        times: milliseconds of every round.
        ratio: the median in units of that of the products at this point; None without them.
        error: of the output, the largest to the float64 reference; None of what has none, or without torch.
        nodes: of the graph that ONNX Runtime makes of an ONNX model; None of what is none.
        load_ms: milliseconds that opening a session takes.
        peak_bytes: by how much a new process grows in its first run; None where the system doesn't say.
    """

    graph: str
    contestant: str
    threads: int
    batch: int
    length: int
    times: tuple[float, ...]
    ratio: float | None = None
    error: float | None = None
    nodes: int | None = None
    load_ms: float | None = None
    peak_bytes: int | None = None

    @property
    def median_ms(self) -> float:
        """Half of the rounds took no longer."""
        return self.percentile(50)

    @property
    def per_second(self) -> float:
        """Windows, frames or pieces of all the batch in a second, at the median."""
        return 1e3 * self.batch / self.median_ms

    def percentile(self, percent: float) -> float:
        """Milliseconds that so many percent of the rounds did not exceed."""
        return float(np.percentile(self.times, percent))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with what the rounds come to in place of each of them."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["times"]
        times = {f"{name}_ms": self.percentile(percent) for name, percent in _PERCENTILES.items()}
        return {**plain, "rounds": len(self.times), **times, "per_second": self.per_second}


_PERCENTILES = {"median": 50, "p95": 95, "p99": 99}


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What bench measured.

    Attributes:
        program: the architecture, or the module's class.
        numerics: of an architecture.
        window: frames of one window.
        providers: that run nodes of the bundle's graph, by short name, and how many each.
        machine: what it was measured on.
        notes: what was left out, and why.
        results: point by point, the bundle first.
    """

    bundle: str
    program: str
    numerics: str | None
    window: int
    providers: dict[str, int]
    machine: dict[str, str | int | None]
    notes: list[str]
    results: list[BenchResult]

    @property
    def title(self) -> str:
        """What was measured, in a few words."""
        return f"{self.program}, {self.numerics} numerics" if self.numerics is not None else self.program

    def find(self, graph: str, contestant: str, **sizes: int) -> BenchResult | None:
        """The first result of a graph and a contestant that has these sizes; None if there is none."""
        for result in self.results:
            same = all(getattr(result, name) == size for name, size in sizes.items())
            if same and (result.graph, result.contestant) == (graph, contestant):
                return result
        return None

    def plot(self, path: str | Path) -> None:
        """Draws the time of a window against its length, and how the times of a frame are spread, to a PNG file.

        Raises:
            RequestError: matplotlib is not installed, or the path is no place for a .png file.
        """
        from .plot import plot

        plot(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "results": [result.to_dict() for result in self.results]}

    def rows(self) -> list[list[str]]:
        """A table with its head."""
        return [list(_HEAD), *(_row(result) for result in self.results)]


def machine() -> dict[str, str | int | None]:
    """The processor, how many of its cores there are, the system, and the versions of the packages."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: installed(package) for package in _PACKAGES},
    }


def folder_of(cpu: str) -> str:
    """A processor's name as that of a folder: "AMD EPYC" becomes amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-") or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


_HEAD = (
    *("graph", "contestant", "threads", "batch", "length"),
    *(*_PERCENTILES, "per s", "ratio", "nodes", "load", "MiB", "error"),
)


def _row(result: BenchResult) -> list[str]:
    return [
        result.graph,
        result.contestant,
        str(result.threads),
        str(result.batch),
        str(result.length),
        *(_figure(result.percentile(percent)) for percent in _PERCENTILES.values()),
        f"{result.per_second:.0f}",
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        "-" if result.nodes is None else str(result.nodes),
        "-" if result.load_ms is None else f"{result.load_ms:.0f}",
        "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}",
        "-" if result.error is None else f"{result.error:.1e}",
    ]


def _figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
