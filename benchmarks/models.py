"""What the four models cost here: bundles beside their bare products, torch, torch.compile and torch's own exporter.

    python benchmarks/models.py                 all models, default sizes, one thread, batch 1: about twelve minutes
    python benchmarks/models.py hymba --quick   a tiny model, to see that it works; printed alone, without --output

It builds bundles in a temporary folder, measures each beside all alternatives at the default window and frame by frame,
and beside torch alone in windows up to 1,024 frames, where the others take too long to make; where the time of a window
goes; how long it takes to build a bundle by command, and to load one in a new process. It prints the tables and writes
models.md (the tables), models.json (all results, and the machine) and models.png.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from request import heading, read_request
from shares import KINDS, shares

import edifice_export as ee
from edifice_export.benchmark.plot import draw_frames, draw_lengths, draw_memory, new_figure, save
from edifice_export.benchmark.results import machine
from edifice_export.bundle.bundle import open_bundle
from edifice_reference.models.registry import ARCHITECTURES

LENGTHS = (60, 128, 256, 512, 1024)
LONG = 1024
QUICK: dict[str, Any] = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
QUICK_LENGTHS, QUICK_LONG = (7, 14, 28), 14

BUILD = "from edifice_export.cli.app import main; main()"
LOAD = """
import sys, time
import edifice_export as ee
from edifice_export.runtime.providers import why_not_usable
why_not_usable("cpu")  # imports what loading needs, and runs a graph, once in a process
start = time.perf_counter()
ee.load(sys.argv[1], threads=1)
print(time.perf_counter() - start)
"""
BUILDS, LOADS = 3, 5
PROFILED = 30
"""Runs of each window with ONNX Runtime's profiler."""


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        build_s: seconds that the command takes that builds it; the median of BUILDS.
        load_ms: milliseconds that opening its window graph takes; the median of LOADS new processes.
        size: bytes of the window graph.
        short: times at the default window and frame by frame.
        growth: times in windows of growing length.
        shares: milliseconds of each kind, in the default window and in the longest.
    """

    build_s: float
    load_ms: float
    size: int
    short: ee.BenchReport
    growth: ee.BenchReport
    shares: dict[int, dict[str, float]]


def measure(name: str, quick: bool, folder: Path) -> Measured:
    """Builds a model and measures it."""
    options, lengths = (QUICK, QUICK_LENGTHS) if quick else ({}, LENGTHS)
    flags = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    builds = []
    for _ in range(1 if quick else BUILDS):
        start = time.perf_counter()
        _run(BUILD, "build", name, f"--output={folder / name}", *flags)
        builds.append(time.perf_counter() - start)
    build_s = statistics.median(builds)
    load_ms = 1e3 * statistics.median(float(_run(LOAD, str(folder / name))) for _ in range(LOADS))

    one: dict[str, Any] = {"threads": [1], "batch": [1], "rounds": 5 if quick else None}
    bundle = open_bundle(folder / name)
    graph = bundle.manifest.graphs["window"]
    window, size = bundle.manifest.window_size, bundle.manifest.files[graph.model].size
    short = ee.bench(bundle, length=[window], against=["eager", "compile", "plain-onnx"], **one)
    if bundle.manifest.max_frames("window") is None:
        growth, longest = ee.bench(bundle, graph="window", length=lengths, against=["eager"], **one), bundle
    else:
        # A graph that is made for one window costs that window whatever it is given: one for each length.
        parts = []
        for length in lengths:
            output = folder / f"{name}_{length}"
            longest = ee.build(name, output=output, graph="window", **options | {"window_size": length})
            parts.append(ee.bench(longest, graph="window", against=["eager"], length=[length], **one))
        growth = dataclasses.replace(parts[0], results=[result for part in parts for result in part.results])
    sizes = ((window, bundle), (max(lengths), longest))
    parted = {length: shares(made.path / graph.model, length, 5 if quick else PROFILED) for length, made in sizes}
    return Measured(build_s, load_ms, size, short, growth, parted)


def _run(code: str, *arguments: str) -> str:
    """What Python prints in a new process."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def tables(models: dict[str, Measured], long: int) -> str:
    """The tables in Markdown; milliseconds are medians."""
    window = next(iter(models.values())).short.window
    bare = ["model", "products", "in ORT"]
    head = [*bare, "torch", "torch.compile", "torch.onnx", "nodes", "bundle", "nodes", "/ products"]
    parts = [_table(f"A window of {window} frames, milliseconds", head, models, _window_row)]
    head = [*bare, "gemv", "torch", "bundle", "nodes", "/ products", "/ gemv", "step", "p99", "prefill 8"]
    parts.append(_table("One frame of a stream, milliseconds", head, models, _frame_row))
    lengths = _lengths(models)
    head = ["model", *(f"{length} frames" for length in lengths), f"products, {long}", "in ORT", f"torch, {long}"]
    parts.append(
        _table("Windows of growing length, milliseconds", head, models, lambda model: _growth_row(model, long))
    )
    for length in next(iter(models.values())).shares:
        title = f"Where the time of a window of {length} frames goes, by ONNX Runtime's profiler, milliseconds"
        rows = {name: model.shares[length] for name, model in models.items()}
        parts.append(_table(title, ["model", *KINDS], rows, _shares_row))
    parts.append(_table("What the first run of one adds to memory, MiB", head[:-3], models, _memory_row))
    head = ["model", "build, s", "window graph, MB", "load, ms"]
    parts.append(_table("Setting up", head, models, _set_up_row))
    return "\n".join(parts)


def _table(title: str, head: list[str], models: dict[str, T], row: Callable[[T], list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *([name, *row(model)] for name, model in models.items())]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def _window_row(model: Measured) -> list[str]:
    ours, plain = _found(model.short, "window", "bundle"), _found(model.short, "window", "plain-onnx")
    alternatives = [_found(model.short, "window", name) for name in ("products", "ort-products", "eager", "compile")]
    times = [f"{result.median_ms:.2f}" for result in (*alternatives, plain)]
    return [*times, f"{plain.nodes}", f"{ours.median_ms:.2f}", f"{ours.nodes}", f"{ours.ratio:.2f}"]


def _frame_row(model: Measured) -> list[str]:
    names = ("products", "ort-products", "gemv", "eager", "bundle", "step")
    bare, in_ort, gemv, eager, ours, step = (_found(model.short, "stream", name) for name in names)
    times = [f"{result.median_ms:.2f}" for result in (bare, in_ort, gemv, eager, ours)]
    ratios = [f"{ours.ratio:.2f}", f"{ours.median_ms / gemv.median_ms:.2f}"]
    back = _found(model.short, "prefill", "bundle")
    slow = [f"{milliseconds:.2f}" for milliseconds in (step.median_ms, step.percentile(99), back.median_ms)]
    return [*times, f"{ours.nodes}", *ratios, *slow]


def _growth_row(model: Measured, long: int) -> list[str]:
    ours = [result for result in model.growth.results if result.contestant == "bundle"]
    others = (_found(model.growth, "window", name, length=long) for name in ("products", "ort-products", "eager"))
    return [f"{result.median_ms:.1f}" for result in (*ours, *others)]


def _shares_row(milliseconds: dict[str, float]) -> list[str]:
    return [f"{milliseconds[kind]:.1f}" for kind in KINDS]


def _memory_row(model: Measured) -> list[str]:
    peaks = [result.peak_bytes for result in model.growth.results if result.contestant == "bundle"]
    return ["-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks]


def _set_up_row(model: Measured) -> list[str]:
    return [f"{model.build_s:.1f}", f"{model.size / 1e6:.0f}", f"{model.load_ms:.0f}"]


def _lengths(models: dict[str, Measured]) -> list[int]:
    growth = next(iter(models.values())).growth
    return [result.length for result in growth.results if result.contestant == "bundle"]


def _found(report: ee.BenchReport, graph: str, contestant: str, **sizes: int) -> ee.BenchResult:
    found = report.find(graph, contestant, **sizes)
    assert found is not None, f"{contestant} was not measured on {graph}"
    return found


def _draw(models: dict[str, Measured], path: Path) -> None:
    figure = new_figure(3, len(models))
    for index, (name, model) in enumerate(models.items()):
        parts = ((draw_lengths, model.growth), (draw_memory, model.growth), (draw_frames, model.short))
        for column, (draw, report) in enumerate(parts):
            axes = figure.add_subplot(len(models), len(parts), index * len(parts) + column + 1)
            draw(axes, report)
            axes.set_title(f"{name}: {axes.get_title()}")
    save(figure, path)


def _described(model: Measured) -> dict[str, Any]:
    set_up = {"build_s": model.build_s, "load_ms": model.load_ms, "window_bytes": model.size}
    parts = {"set_up": set_up, "default": _plain(model.short), "lengths": _plain(model.growth)}
    return {**parts, "shares_ms": model.shares}


def _plain(report: ee.BenchReport) -> dict[str, Any]:
    plain = report.to_dict()
    for temporary in ("bundle", "machine"):
        del plain[temporary]
    return plain


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    asked = read_request(__doc__, ARCHITECTURES, arguments)
    models: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.names:
            models[name] = measure(name, asked.quick, Path(folder))
            print(f"measured {name}", flush=True)
    text = heading() + tables(models, QUICK_LONG if asked.quick else LONG)
    print(text)
    if asked.output is None:
        return
    (asked.output / "models.md").write_text(text, encoding="utf-8")
    results = {"machine": machine(), "models": {name: _described(model) for name, model in models.items()}}
    (asked.output / "models.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _draw(models, asked.output / "models.png")


if __name__ == "__main__":
    main()
