"""Files: an output is written whole or not at all, and nothing is lost to one that was not named."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import RequestError
from .claim import NEW, claim

__all__ = ["check_output", "is_within", "replacing", "same_file"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, moved to `path` at the end; whatever goes wrong, a file that was there stays.

    Raises:
        RequestError: `path` is no place for a file, see check_output; what is there came or was changed meanwhile; the
            new file can't be written.
    """
    try:
        before = check_output(path)
        place = Path(os.path.realpath(path))
        with claim(place) as folder:
            yield folder / NEW
            if check_output(path) != before:
                raise RequestError(f"{path}: was written by something else meanwhile, and is left so; name another")
            (folder / NEW).replace(place)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror}; name another place") from error


def check_output(path: Path) -> tuple[int, ...] | None:
    """Which file an output would replace, and in which state it is; None if there is none.

    Raises:
        RequestError: a folder, a symbolic link or a device is there, or it can't be looked at.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror}; name another place") from error
    if stat.S_ISLNK(found.st_mode):
        raise RequestError(f"{path}: is a symbolic link; name the file that it leads to")
    if stat.S_ISDIR(found.st_mode):
        raise RequestError(f"{path}: is a folder; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise RequestError(f"{path}: is no ordinary file; name another")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder that exists: through links, with other letters, by any name."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, of something that need not exist, is a folder or below it, by whatever names."""
    place = Path(os.path.realpath(path))
    return any(same_file(each, folder) for each in (place, *place.parents))
