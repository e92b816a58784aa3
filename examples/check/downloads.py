"""Packages that checks bring: each is known by its SHA-256, and unpacked once."""

from __future__ import annotations

import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from .language import CheckError, check_hash, run

__all__ = ["npm", "pip", "unpack", "unpacked"]

Package = tuple[str, str, str]
"""What is asked for, the file that comes, and its SHA-256."""


def npm(package: Package, folder: Path) -> None:
    """Brings a package of npm into a folder, unless it is there.

    Raises:
        CheckError: it could not be had, or is not the one that is known.
    """
    name, file, sha256 = package
    _download(["npm", "pack", "--loglevel=error", "--pack-destination", str(folder), name], folder / file, sha256)


def pip(package: Package, folder: Path, *options: str) -> None:
    """The same of PyPI; options such as the platform that it is for."""
    name, file, sha256 = package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *options]
    _download([*command, "--dest", str(folder), name], folder / file, sha256)


def _download(command: list[str], file: Path, sha256: str) -> None:
    """Runs a command that brings a file, unless the file is there and the one that is known."""
    if file.is_file():
        try:
            return check_hash(file, sha256)
        except CheckError:
            file.unlink()
    result = run(command)
    if result.returncode != 0 or not file.is_file():
        raise CheckError(f"{file.name} could not be downloaded: {result.stderr.strip()[-500:] or 'no such file came'}")
    return check_hash(file, sha256)


def unpacked(archive: Path) -> Path:
    """The folder that an archive is unpacked to."""
    return archive.with_suffix("")


def unpack(archive: Path, part: str) -> None:
    """Unpacks what is below a folder of an archive, once."""
    if unpacked(archive).is_dir():
        return
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        unfinished = Path(folder) / "unpacked"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unfinished, [name for name in wheel.namelist() if name.startswith(part)])
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(unfinished, [m for m in tar if m.name.startswith(part)], filter="data")
        unfinished.rename(unpacked(archive))
