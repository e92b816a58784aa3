"""What the checks ask of a language: get its tools, build its sample, run it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["CheckError", "Language", "Run", "check_hash", "run"]

Run = subprocess.CompletedProcess[str]
"""A finished run of a sample: exit status, standard output and error."""


class CheckError(Exception):
    """A check failed, or what it needs could not be had: the same, since nothing is skipped."""


class Language(Protocol):
    """A language that a sample is written in."""

    name: str
    sample: str
    """What `edifice-export scaffold` calls it."""

    def install(self, folder: Path) -> None:
        """Gets what the machine lacks into a folder, or finds it there.

        Raises:
            CheckError: it could not be had.
        """

    def build(self, sample: Path) -> None:
        """Makes a scaffolded folder ready to run.

        Raises:
            CheckError: the compiler refused it.
        """

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Runs the sample's program on a bundle."""

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """Checks of this language alone; one line for each says what it showed.

        Raises:
            CheckError: one failed.
        """


def run(
    arguments: Sequence[str | Path],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    seconds: float = 900,
) -> Run:
    """Runs a program to its end, without raising for its exit status.

    Raises:
        CheckError: there is no such program, or it did not end.
    """
    command = [str(argument) for argument in arguments]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError as error:
        raise CheckError(f"{command[0]} is not installed; .ci/embedding installs what the checks need") from error
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"{' '.join(command)} did not end within {seconds:g} s") from error


def check_hash(path: Path, sha256: str) -> None:
    """Refuses a download that is not the one that is known.

    Raises:
        CheckError: another SHA-256.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckError(f"{path.name} has the SHA-256 {found}, expected {sha256}; it was not used")
