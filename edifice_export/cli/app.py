"""The command line: parses and prints, decides nothing. Exit status: 0 done, 1 a check failed, 2 a wrong request."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from edifice_reference.models.config import OptionError

from ..errors import ExportError, brief
from .bench import bench
from .build import BuildGroup
from .console import interrupted, print_anywhere, print_json, say
from .convert import convert
from .doctor import doctor
from .export import export
from .inspect import inspect
from .list import list_architectures
from .run import run
from .scaffold import scaffold
from .verify import verify

__all__ = ["app", "main"]

COMMANDS: dict[str, Callable[..., None]] = {
    "bench": bench,
    "list": list_architectures,
    "export": export,
    "verify": verify,
    "run": run,
    "inspect": inspect,
    "convert": convert,
    "scaffold": scaffold,
    "doctor": doctor,
}
"""The commands in the order of the help, which ends with `build`. What only some need, they import when they run."""

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
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


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


if __name__ == "__main__":
    main()
