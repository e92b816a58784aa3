"""What the commands print: tables, JSON, and progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from ..errors import printable

__all__ = ["interrupted", "print_anywhere", "print_json", "print_table", "progress_bar", "say"]

interrupted: list[int] = []
"""The signals that asked this process to stop."""


def say(line: str = "", err: bool = False) -> None:
    """Prints a line; all that the commands print goes through here or is JSON, in which all but ASCII is escaped.

    Args:
        line: what it says. Names in it may come from a file of anybody's, so nothing in it reaches the terminal that is
            not printable.
        err: to standard error.
    """
    typer.echo(printable(line), err=err)


def print_anywhere() -> None:
    """Lets output hold what a terminal's encoding lacks: such a letter is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Prints plain JSON values to standard output."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in aligned columns; the last column is as long as it needs to be."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    for row in shown:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """What to call as work goes on: on a terminal, a bar on standard error that lives until the end of the block.

    It ends work that was asked to stop: libraries catch an interrupt and go on.
    """
    shown = sys.stderr.isatty()
    bar: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if interrupted:
            raise KeyboardInterrupt
        if not shown:
            return
        if bar is None:
            bar = typer.progressbar(length=total, label=label, file=sys.stderr)
            bar.__enter__()
        bar.update(done - bar.pos)

    try:
        yield update
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
