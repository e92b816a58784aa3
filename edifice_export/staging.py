"""Staging: a bundle is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .arguments import check_name
from .errors import CheckError, RequestError
from .manifest import MANIFEST
from .manifest_reader import listed_files

__all__ = ["new_file_mode", "staging"]


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to fill, moved into its place at the end; removed if anything goes wrong.

    Raises:
        RequestError: the target is a file, or a folder with something that is not of a bundle, or can't be written.
    """
    check_name(target, "--output")
    made: list[Path] = []
    folder: Path | None = None
    try:
        _check_replaceable(target)
        place = target.absolute()
        _make_parents(place, made)
        # Named before it is made, so that an interrupt in between leaves nothing either.
        folder = place.parent / f".{place.name[:32]}.{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        yield folder
        folder.chmod(new_file_mode(0o777))
        _replace(folder, place)
    except BaseException as error:
        if folder is not None:
            _remove(folder)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = "the disk is full; free some space" if full else f"{error.strerror}; choose another --output"
            raise RequestError(f"--output {target}: can't write there: {problem}") from error
        raise


def _check_replaceable(target: Path) -> None:
    if target.is_symlink():
        raise RequestError(f"--output {target}: is a symbolic link; name the folder that it leads to")
    if target.exists() and not target.is_dir():
        raise RequestError(f"--output {target}: is a file, and a bundle is a folder; choose another --output")
    if target.is_dir() and Path.cwd().is_relative_to(target.absolute().resolve()):
        raise RequestError(f"--output {target}: is the working folder or above it; name another")
    if not target.is_dir():
        return
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise RequestError(f"--output {target}: holds files and no bundle; choose another --output")
    try:
        known = listed_files(target) | {MANIFEST}
    except CheckError as error:
        raise RequestError(f"--output {target}: holds a damaged bundle; remove it or choose another") from error
    foreign = sorted(
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(target).as_posix() not in known
    )
    if foreign:
        raise RequestError(
            f"--output {target}: holds {foreign[0]}, which is not of the bundle there; move it or choose another"
        )


def _make_parents(target: Path, made: list[Path]) -> None:
    missing = [parent for parent in target.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        made.append(parent)


def _replace(folder: Path, target: Path) -> None:
    """Moves a folder into a bundle's place; whatever happens, one of the two is there whole."""
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(f"{folder.name}.old")
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists():
            if target.exists():
                target.rename(folder)
            old.rename(target)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    """Removes a folder even if it was made read-only."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def new_file_mode(rights: int) -> int:
    """Rights that a new file or folder gets of those that it asks for."""
    mask = os.umask(0)
    os.umask(mask)
    return rights & ~mask
