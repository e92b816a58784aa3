"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_json, print_table, progress_bar, say
from .options import BundlePath, Json

if TYPE_CHECKING:
    from ..benchmark.results import BenchReport

__all__ = ["bench"]


def bench(
    bundle: BundlePath,
    graph: Annotated[str, typer.Option(metavar="window|stream|both", help="What to measure.")] = "both",
    provider: Annotated[
        list[str] | None,
        typer.Option("--provider", metavar="NAME", help="Execution provider; repeat in order of preference."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads within an operator; repeatable [default: 1, and the processors, 4 at most]."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Windows or streams at once; repeatable [default: 1 and 8].")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Frames of a window; repeatable [default: the bundle's, a quarter and four times as many]."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Alternatives beside it: eager, compile (torch), plain-onnx (torch's exporter). The last two take up "
            "to minutes for each batch and length; beside them only the first of each default is measured.",
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Times that each is run [default: for about a second].")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the results (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle's latency, throughput and memory on this machine, beside its bare matrix products."""
    from ..benchmark.bench import bench as measure
    from ..benchmark.plot import check_plot

    if plot is not None:
        check_plot(plot)
    names = [name for text in against or [] for name in text.split(",")]
    with progress_bar("measuring") as progress:
        report = measure(
            bundle,
            providers=provider or ("cpu",),
            graph=graph,
            threads=threads,
            batch=batch,
            length=length,
            against=names,
            rounds=rounds,
            progress=progress,
        )
    if plot is not None:
        report.plot(plot)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)


def _print(report: BenchReport) -> None:
    nodes = ", ".join(f"{name} ({count} nodes)" for name, count in report.providers.items())
    facts = {key: value for key, value in report.machine.items() if key not in ("platform", "cpu", "cores")}
    say(f"{report.title}, window of {report.window} frame{'s' * (report.window != 1)}, on {nodes}")
    say(f"{report.machine['cpu']}, {report.machine['cores']} cores")
    say(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print_table(report.rows())
    say("median, p95, p99, load: milliseconds; per s: windows, frames or pieces; ratio: of medians, to the products;")
    say("load: opening a session; MiB: what a first run adds; error: to the float64 reference")
    for note in report.notes:
        say(note)
