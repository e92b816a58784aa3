"""The command line: parses and prints, decides nothing. Exit status: 0 done, 1 a check failed, 2 a wrong request."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from edifice_reference.models.config import OptionError
from edifice_reference.models.registry import ARCHITECTURES

from ..errors import ExportError, brief
from .bench import bench
from .build import BuildGroup, parse_options
from .console import interrupted, print_anywhere, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from ..verification.report import Case

__all__ = ["app", "main"]

app = typer.Typer(
    help="State-space, long-convolution and hybrid sequence models to verified ONNX bundles.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(cls=BuildGroup, rich_markup_mode=None),
    name="build",
    help="Build a verified bundle of an architecture.",
    subcommand_metavar="ARCHITECTURE [OPTIONS]",
)
app.command()(bench)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")]
Providers = Annotated[
    list[str] | None,
    typer.Option("--provider", metavar="NAME", help="Execution provider, such as cuda; repeat in order of preference."),
]


def _print_version(asked: bool) -> None:
    if asked:
        say(f"edifice-export {version('edifice-export')}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """State-space, long-convolution and hybrid sequence models to verified ONNX bundles."""


@app.command("list")
def list_architectures(as_json: Json = False) -> None:
    """List the architectures, one line each."""
    if as_json:
        print_json(
            [
                {"name": known.name, "summary": known.summary, "edifice_module": known.edifice_module}
                for known in ARCHITECTURES.values()
            ]
        )
    else:
        print_table([(known.name, known.summary) for known in ARCHITECTURES.values()])


@app.command()
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
    as_json: Json = False,
) -> None:
    """Compare a bundle with its float64 reference; exit status 1 if they differ."""
    from ..verification import verify as parity
    from ..verification.report import describe_gap, describe_stream

    with progress_bar("verifying") as progress:
        report = parity.verify(bundle, provider, tolerance, every_prefix, progress)
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
                "batch",
                "length",
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
        if report.reference == "float64 reference":
            if report.prefixes:
                say(f"prefix lengths verified: {report.prefixes} of {report.window}")
            if report.frames:
                say(describe_stream(report.frames, report.histories))
        else:
            say("only the bundle's test data: the float64 reference needs torch, which can't be imported here")
        if report.recurrence_gap is not None:
            say(describe_gap(report.recurrence_gap))
        if report.passed:
            say(f"ok: {report.summary()}")
    if not report.passed:
        say(f"error: verify {bundle}: {report.summary()}", err=True)
        raise typer.Exit(1)


@app.command()
def run(
    bundle: BundlePath,
    source: Annotated[Path, typer.Option("--input", help="Recording: .npy, .npz or .csv, [T, E] or [B, T, E].")],
    target: Annotated[Path, typer.Option("--output", help="Where the outputs go: .npy.")],
    stride: Annotated[int, typer.Option(help="Frames between the windows of a recording longer than one.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Frame by frame, writing the output at every one.")] = False,
    provider: Providers = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads within an operator [default: ONNX Runtime's choice].")
    ] = None,
    optimization: Annotated[str, typer.Option(help="Graph optimisation: all, extended, basic or none.")] = "all",
    as_json: Json = False,
) -> None:
    """Run a recording through a bundle."""
    from ..runtime.model import load
    from ..runtime.run import RunReport, StreamReport, run_recording, stream_recording

    model = load(bundle, provider or ("cpu",), threads, optimization)
    with progress_bar("running") as progress:
        run_all: Callable[..., RunReport | StreamReport] = stream_recording if stream else run_recording
        done = run_all(model, source, target, stride, progress)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    written = f"on {_placement(done.providers)}: {done.output} float32 {done.shape}"
    if isinstance(done, StreamReport):
        say(f"streamed {done.batch} recording{'s' * (done.batch != 1)} of {done.frames} frames {written}")
    else:
        say(f"ran {done.windows} window{'s' * (done.windows != 1)} of {done.window} frames {written}")
    if done.lines is not None:
        say(f"{source}: {done.lines}")
    for name, reason in model.passed_over.items():
        say(f"passed over {name}: {reason}")
    if isinstance(done, RunReport) and done.unused_frames:
        say(f"the last {done.unused_frames} frames fill no window at stride {done.stride}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="Folder of a bundle, or an ONNX model.")],
    batch: Annotated[int | None, typer.Option(help="Batch that costs are counted for [default: 1].")] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Frames that costs are counted for [default: a bundle's window].")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a bundle: window, stream or prefill [default: the first].")
    ] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Show which body each edifice op got, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a graph holds and costs."""
    from ..inspection.report import explain, inspect_path, rows_of

    model, inspection = inspect_path(path, batch, sequence, graph)
    lowerings = explain(model) if explained else []
    if as_json:
        print_json({"model": model, **inspection.to_dict(), **({"lowerings": lowerings} if explained else {})})
        return
    print_table([("model", model), *rows_of(inspection)])
    if explained:
        say()
        print_table([("node", "op", "lowering", "body", "why"), *(tuple(each.values()) for each in lowerings)])


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Weights: safetensors, .nx, .axon, Nx.serialize.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .safetensors, .nx, .axon or .nxbin.")],
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="[default: what IN states, or its names tell]")
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="torch|edifice", help="Names in a .safetensors OUT [default: torch].")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="What IN can't tell, such as num_heads=4; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert weights between this project's files and Edifice's."""
    from ..weights.convert import convert as convert_weights

    options = parse_options(option or [])
    done = convert_weights(source, target, architecture=architecture, names=names, **options)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    say(f"wrote {done.output}: {done.architecture}, {done.tensors} tensors, {done.parameters:,} parameters")
    for note in done.notes:
        say(note)


@app.command()
def scaffold(
    language: Annotated[str, typer.Argument(metavar="cpp|csharp|node|web", help="Language of the sample.")],
    bundle: BundlePath,
    output: Annotated[Path, typer.Option(help="New folder for the sample and a copy of the bundle.")],
    as_json: Json = False,
) -> None:
    """Write a sample program in another language, with a bundle beside it."""
    from ..scaffolding.scaffold import scaffold as write_sample

    done = write_sample(language, bundle, output)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    say(f"wrote {done.output}: {language}/ and bundle/ ({done.architecture}); {done.readme} says how to run it")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show which providers really work on this machine, and what the others lack."""
    from ..runtime.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(dataclasses.asdict(diagnosis))
        return
    print_table(
        [
            ("python", diagnosis.python),
            ("platform", diagnosis.platform),
            *((package, found or "not installed") for package, found in diagnosis.packages.items()),
            ("build", "works" if diagnosis.can_build else "needs torch: pip install torch"),
        ]
    )
    say()
    print_table(
        [
            ("provider", "usable", "missing"),
            *((state.name, "yes" if state.usable else "no", state.missing or "") for state in diagnosis.providers),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `edifice-export`: turns every error into one line and an exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # Wherever it stands: an error is often seen before the option is thought of.
    given = [argument for argument in given if argument != "--debug"]
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            signal.signal(number, _interrupt)
    sys.unraisablehook = _report_unraisable
    print_anywhere()
    # Python would look for cycles among all that torch makes, again and again: two seconds of a build, one at the end.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    try:
        status = app(given or ["--help"], prog_name="edifice-export", standalone_mode=False) or 0
        message = ""
    except Exception as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                say(line, err=True)
        message, status = _describe(error)
    if interrupted or status == 130:  # the status that Typer gives an interrupt
        # Whatever became of it on its way: torch turns an interrupt into errors of its own.
        message, status = "interrupted; nothing is left half written", 128 + (interrupted or [signal.SIGINT])[0]
    if message:
        with contextlib.suppress(OSError):  # it may be standard output that failed
            if "--json" in given:
                print_json({"error": message, "exit_status": status})
        with contextlib.suppress(OSError):  # a terminal that is gone
            say(f"error: {message}", err=True)
    sys.exit(status)


def _describe(error: Exception) -> tuple[str, int]:
    """One line and an exit status for an error."""
    if _lost_folder(error):
        return "the working folder: was removed or moved away; go to one that is there", 2
    if isinstance(error, (ExportError, OptionError)):
        return _one_line(error), getattr(error, "exit_status", 2)
    if isinstance(error, TyperException):
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if isinstance(error.__cause__, ValueError) and hasattr(error.__cause__, "errors"):
            # Typer names the option and not the value that it could not convert.
            text += f", got {error.__cause__.errors()[0]['input']!r}"
        return _one_line(text), getattr(error, "exit_code", 2)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory for this; choose smaller options or a smaller input", 2
    if isinstance(error, OSError):
        place = "standard output" if error.filename is None else os.fsdecode(error.filename)
        return _one_line(f"{place}: {error.strerror}; check the path, its rights and the disk"), 2
    return f"{type(error).__name__}: {_one_line(brief(error))}; this is a bug, --debug shows where", 1


def _lost_folder(error: BaseException | None) -> bool:
    """Whether an error comes of a working folder that was removed: asking for its name fails, and names nothing."""
    while error is not None:
        if isinstance(error, FileNotFoundError) and error.filename is None:
            return True
        error = error.__cause__
    return False


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())


def _interrupt(number: int, _frame: Any) -> None:
    interrupted.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process even inside native code
    logging.disable(logging.CRITICAL)
    raise KeyboardInterrupt


def _report_unraisable(ignored: Any) -> None:
    """An interrupt may come while Python cleans up, where nothing can be raised; it is noted all the same."""
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)


def _placement(nodes: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} nodes)" for name, count in nodes.items())


def _case_row(case: Case) -> list[str]:
    return [
        case.graph,
        case.provider,
        case.source,
        str(case.batch),
        str(case.length),
        str(case.seed),
        f"{case.magnitude:g}",
        f"{case.max_abs:.1e}",
        f"{case.max_rel:.1e}",
        f"{case.allowed:.1e}",
    ]


if __name__ == "__main__":
    main()
