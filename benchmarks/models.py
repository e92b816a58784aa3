"""What the four models cost here: bundles beside their bare products, torch, torch.compile and torch's own exporter.

    python benchmarks/models.py                 all models, default sizes, one thread, batch 1: about ten minutes
    python benchmarks/models.py hymba --quick   tiny models, to see that it works

It builds bundles in a temporary folder, measures each beside all alternatives at the default window and frame by frame,
and beside torch alone in windows up to 1,024 frames, where the others take too long to make. It prints the tables and
writes models.md (the tables), models.json (all results, and the machine) and models.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import edifice_export as ee
from edifice_export.benchmark.plot import draw_frames, draw_lengths, draw_memory, new_figure, save
from edifice_export.benchmark.results import folder_of, machine
from edifice_reference.registry import ARCHITECTURES

LENGTHS = (60, 128, 256, 512, 1024)
LONG = 1024
QUICK: dict[str, Any] = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
QUICK_LENGTHS, QUICK_LONG = (7, 14, 28), 14

Reports = tuple[ee.BenchReport, ee.BenchReport]
"""Of a model: at its default window and frame by frame; in windows of growing length."""


def measure(name: str, quick: bool, folder: Path) -> Reports:
    """Builds a model and measures it."""
    options, lengths = (QUICK, QUICK_LENGTHS) if quick else ({}, LENGTHS)
    one: dict[str, Any] = {"threads": [1], "batch": [1], "rounds": 5 if quick else None}
    bundle = ee.build(name, output=folder / name, **options)
    window = bundle.manifest.window_size
    short = ee.bench(bundle, length=[window], against=["eager", "compile", "plain-onnx"], **one)
    if bundle.manifest.graphs["window"].max_sequence is None:
        return short, ee.bench(bundle, graph="window", length=lengths, against=["eager"], **one)
    # A graph that is made for one window costs that window whatever it is given: one for each length.
    parts = []
    for length in lengths:
        output = folder / f"{name}_{length}"
        made = ee.build(name, output=output, graph="window", **options | {"window_size": length})
        parts.append(ee.bench(made, graph="window", against=["eager"], length=[length], **one))
    return short, dataclasses.replace(parts[0], results=[result for part in parts for result in part.results])


def tables(reports: dict[str, Reports], long: int) -> str:
    """The tables in Markdown; milliseconds are medians."""
    window = next(iter(reports.values()))[0].window
    head = ["model", "products", "torch", "torch.compile", "torch.onnx", "nodes", "bundle", "nodes", "/ products"]
    parts = [_table(f"A window of {window} frames, milliseconds", head, reports, _window_row)]
    head = ["model", "products", "gemv", "torch", "bundle", "nodes", "/ products", "/ gemv", "step", "p99", "prefill 8"]
    parts.append(_table("One frame of a stream, milliseconds", head, reports, _frame_row))
    lengths = _lengths(reports)
    head = ["model", *(f"{length} frames" for length in lengths), f"torch, {long} frames"]
    parts.append(_table("Windows of growing length, milliseconds", head, reports, lambda pair: _growth_row(pair, long)))
    parts.append(_table("What the first run of one adds to memory, MiB", head[:-1], reports, _memory_row))
    return "\n".join(parts)


def _table(title: str, head: list[str], reports: dict[str, Reports], row: Callable[[Reports], list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *([name, *row(pair)] for name, pair in reports.items())]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def _window_row(pair: Reports) -> list[str]:
    ours, plain = _found(pair[0], "window", "bundle"), _found(pair[0], "window", "plain-onnx")
    alternatives = [_found(pair[0], "window", name) for name in ("products", "eager", "compile")]
    times = [f"{result.median_ms:.2f}" for result in (*alternatives, plain)]
    return [*times, f"{plain.nodes}", f"{ours.median_ms:.2f}", f"{ours.nodes}", f"{ours.ratio:.2f}"]


def _frame_row(pair: Reports) -> list[str]:
    names = ("products", "gemv", "eager", "bundle", "step")
    bare, gemv, eager, ours, step = (_found(pair[0], "stream", name) for name in names)
    times = [f"{result.median_ms:.2f}" for result in (bare, gemv, eager, ours)]
    ratios = [f"{ours.ratio:.2f}", f"{ours.median_ms / gemv.median_ms:.2f}"]
    back = _found(pair[0], "prefill", "bundle")
    slow = [f"{milliseconds:.2f}" for milliseconds in (step.median_ms, step.percentile(99), back.median_ms)]
    return [*times, f"{ours.nodes}", *ratios, *slow]


def _growth_row(pair: Reports, long: int) -> list[str]:
    ours = [result for result in pair[1].results if result.contestant == "bundle"]
    torch = _found(pair[1], "window", "eager", length=long)
    return [f"{result.median_ms:.1f}" for result in (*ours, torch)]


def _memory_row(pair: Reports) -> list[str]:
    peaks = [result.peak_bytes for result in pair[1].results if result.contestant == "bundle"]
    return ["-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks]


def _lengths(reports: dict[str, Reports]) -> list[int]:
    _, growth = next(iter(reports.values()))
    return [result.length for result in growth.results if result.contestant == "bundle"]


def _found(report: ee.BenchReport, graph: str, contestant: str, **sizes: int) -> ee.BenchResult:
    found = report.find(graph, contestant, **sizes)
    assert found is not None, f"{contestant} was not measured on {graph}"
    return found


def _draw(reports: dict[str, Reports], path: Path) -> None:
    figure = new_figure(3, len(reports))
    for index, (name, (short, growth)) in enumerate(reports.items()):
        parts = ((draw_lengths, growth), (draw_memory, growth), (draw_frames, short))
        for column, (draw, report) in enumerate(parts):
            axes = figure.add_subplot(len(reports), len(parts), index * len(parts) + column + 1)
            draw(axes, report)
            axes.set_title(f"{name}: {axes.get_title()}")
    save(figure, path)


def _plain(report: ee.BenchReport) -> dict[str, Any]:
    plain = report.to_dict()
    for temporary in ("bundle", "machine"):
        del plain[temporary]
    return plain


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--output", type=Path, help="folder to write to [default: results/PROCESSOR beside this file]")
    given = parser.parse_args(arguments)
    reports: dict[str, Reports] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models or ARCHITECTURES:
            reports[name] = measure(name, given.quick, Path(folder))
            print(f"measured {name}", flush=True)
    described = machine()
    on = ", ".join(f"{key} {value}" for key, value in described.items() if key != "cpu")
    text = f"One thread, batch 1, on {described['cpu']}: {on}.\n\n"
    text += tables(reports, QUICK_LONG if given.quick else LONG)
    print(text)
    output = given.output or Path(__file__).parent / "results" / folder_of(str(described["cpu"]))
    output.mkdir(parents=True, exist_ok=True)
    (output / "models.md").write_text(text, encoding="utf-8")
    models = {name: {"default": _plain(short), "lengths": _plain(growth)} for name, (short, growth) in reports.items()}
    results = {"machine": described, "models": models}
    (output / "models.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _draw(reports, output / "models.png")


if __name__ == "__main__":
    main()
