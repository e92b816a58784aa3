"""Requests: what a benchmark is asked for, refused before anything is measured, and the machine that it runs on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from edifice_export.benchmark.plot import new_figure
from edifice_export.benchmark.results import folder_of, machine
from edifice_export.errors import RequestError

__all__ = ["Request", "heading", "read_request"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and where the results go.

    Attributes:
        names: of what is measured.
        quick: small and with few rounds, to see that it works.
        output: a folder; None for tables on the screen alone.
    """

    names: list[str]
    quick: bool
    output: Path | None


def read_request(document: str, known: Collection[str], arguments: Sequence[str] | None) -> Request:
    """Reads a command line; exits with status 2 and a reason if it can't be met.

    The results of all are not replaced by a part or a quick run: where no place is named, these are printed alone.

    Args:
        document: of the benchmark, for --help.
        known: names that can be asked for; all are measured if none is.
        arguments: of the command line; those of this process if None.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(names=[])
    if known:
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} [default: all]")
    parser.add_argument("--quick", action="store_true", help="small and with few rounds, to see that it works")
    parser.add_argument("--output", type=Path, help="folder to write to [default: for all, results/PROCESSOR]")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"there is no {', '.join(unknown)} to measure; there are {', '.join(known)}")
    output = given.output
    if output is None and not given.names and not given.quick:
        output = Path(__file__).parent / "results" / folder_of(str(machine()["cpu"]))
    if output is not None:
        try:
            new_figure(1, 1)
            output.mkdir(parents=True, exist_ok=True)
        except RequestError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"--output {output}: {error.strerror}; name another folder")
    return Request(given.names or list(known), given.quick, output)


def heading() -> str:
    """The first line of the tables: the machine."""
    described = machine()
    on = ", ".join(f"{key} {value}" for key, value in described.items() if key != "cpu")
    return f"One thread, batch 1, on {described['cpu']}: {on}.\n\n"
