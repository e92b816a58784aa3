"""Claim: the hidden folder beside an output in which it is made, for one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import RequestError

__all__ = ["NEW", "claim"]

NEW = "new"
"""In the folder, the file or the folder that is being made."""

_LOCK = "lock"

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def claim(place: Path) -> Iterator[Path]:
    """The hidden folder for what will be at `place`, this block's alone; it is gone at the end, and so is NEW in it.

    It has one name for each place, and a lock that the system takes back from a process that ends, however it ends. So
    what is found in it at first was left by a process that was killed: NEW is removed, the rest is the caller's to
    settle. The folder stays if anything else is left in it.

    Raises:
        RequestError: another process, or another thread, makes the same output.
        OSError: no folder or no lock can be had there.
    """
    name = hashlib.sha256(os.fsencode(place.name.casefold())).hexdigest()
    folder = place.with_name(f".{place.name[:32]}.{name[:8]}.edifice-export")
    lock = _acquire(folder, place)
    try:
        _remove(folder / NEW)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder / NEW)
        _release(folder, lock)


def _acquire(folder: Path, place: Path) -> int:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise FileExistsError(errno.EEXIST, f"{folder} is a link", str(folder))
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # who held it has just removed the folder
        try:
            _lock(lock)
            held = _is_at(lock, folder / _LOCK)  # if not, who held it has just removed it
        except (BlockingIOError, PermissionError) as error:
            os.close(lock)
            raise RequestError(f"{place}: another process is writing it; wait for that, or name another") from error
        except OSError as error:
            os.close(lock)
            raise RequestError(
                f"{place}: no file can be locked there ({error.strerror}); write to another disk, and move it then"
            ) from error
        if held:
            return lock
        os.close(lock)


def _release(folder: Path, lock: int) -> None:
    if sys.platform == "win32":  # where an open file can't be removed
        os.close(lock)
    with contextlib.suppress(OSError):
        (folder / _LOCK).unlink()
        folder.rmdir()
    if sys.platform != "win32":
        os.close(lock)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
