"""The command `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_json, print_table, progress_bar, say
from .options import BundlePath, Json

if TYPE_CHECKING:
    from ..verification.report import Case

__all__ = ["verify"]


def verify(
    bundle: BundlePath,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", metavar="NAME", help="Execution provider; repeat for several [default: all usable]."
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest error allowed [default: the one it was built with].")
    ] = None,
    every_prefix: Annotated[
        bool, typer.Option("--every-prefix", help="Every prefix length, even of a window above 256 frames.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="Of an exported module: the code that makes it, which is run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its float64 reference; exit status 1 if they differ."""
    from ..programs.source import load_source
    from ..verification import verify as parity
    from ..verification.report import describe_gap, describe_stream

    with progress_bar("verifying") as progress:
        made = load_source(source) if source is not None else None
        report = parity.verify(bundle, provider, tolerance, every_prefix, progress, made)
    if as_json:
        failure = {} if report.passed else {"error": report.summary(), "exit_status": 1}
        print_json(report.to_dict() | failure)
    else:
        if report.loosened is not None:
            say(report.loosened)
        rows = [
            [
                "graph",
                "provider",
                "compared with",
                "sizes",
                "seed",
                "magnitude",
                "max abs",
                "max rel",
                "allowed",
            ]
        ]
        rows += [_case_row(case) for case in report.cases[:10]]
        print_table(rows)
        say(f"(the worst {min(10, len(report.cases))} of {len(report.cases)} cases)")
        if report.prefixes:
            say(f"prefix lengths verified: {report.prefixes} of {report.window}")
        if report.sizes:
            say(f"verified at {report.sizes} different sizes")
        if report.frames:
            say(describe_stream(report.frames, report.histories))
        if report.why_test_data is not None:
            say(f"only the bundle's test data: {report.why_test_data}")
        if report.recurrence_gap is not None:
            say(describe_gap(report.recurrence_gap))
        if report.passed:
            say(f"ok: {report.summary()}")
    if not report.passed:
        say(f"error: verify {bundle}: {report.summary()}", err=True)
        raise typer.Exit(1)


def _case_row(case: Case) -> list[str]:
    return [
        case.graph,
        case.provider,
        case.source,
        case.at,
        str(case.seed),
        f"{case.magnitude:g}",
        f"{case.max_abs:.1e}",
        f"{case.max_rel:.1e}",
        f"{case.allowed:.1e}",
    ]
