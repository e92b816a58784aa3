"""Staging: a bundle is written whole or not at all, and replaces nothing but a whole bundle."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ..arguments import check_name
from ..errors import CheckError, RequestError
from ..writing.claim import NEW, claim
from ..writing.exchange import exchange
from ..writing.files import is_within
from .bundle import check_file, hash_file
from .manifest import MANIFEST, FileEntry
from .manifest_reader import listed_files

__all__ = ["staging"]

_OTHER, _OLD = "other", "old"
"""In the hidden folder: the new bundle until it is exchanged with the old one, and the old one after that; where no two
can be exchanged, the old one until the new one is in its place."""

_Files = Mapping[str, FileEntry]


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder to fill, moved to `target` at the end; a whole bundle there, or an empty folder, is replaced.

    At every moment the old bundle or the new one is there, but for systems that can't exchange folders: if a process is
    killed there between two renames, the next one to come puts the old one back. Whoever comes next also removes what
    the killed one left. Of an old bundle the files that its manifest lists are removed and nothing else.

    Raises:
        RequestError: something else is at the target, came there meanwhile, or it can't be written. It is as it was.
    """
    check_name(target, "--output")
    made: list[Path] = []
    try:
        _check_kind(target, target)
        place = Path(os.path.realpath(target))
        _make_parents(place, made)
        with claim(place) as folder:
            _settle(folder, place)
            before = _look(place, target)
            _check_movable(place, folder, target)
            try:
                (folder / NEW).mkdir()
                yield folder / NEW
                _replace(folder, place, target, before)
            finally:
                _settle(folder, place)
    except BaseException as error:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = "the disk is full; free some space" if full else f"{error.strerror}; choose another --output"
            raise RequestError(f"--output {target}: can't write there: {problem}") from error
        raise


def _look(place: Path, target: Path) -> _Files:
    """The files of the whole bundle that is at a place, none if it is free; refuses whatever else is there."""
    if not _check_kind(place, target):
        return {}
    if is_within(Path.cwd(), place):
        raise RequestError(f"--output {target}: is the working folder or above it; name another")
    if _foreign(place, ()) is None:
        return {}
    if not (place / MANIFEST).is_file():
        raise RequestError(f"--output {target}: holds files and no bundle; choose another --output")
    try:
        files = listed_files(place)
    except CheckError as error:
        raise RequestError(
            f"--output {target}: holds a damaged bundle, or none of this tool; move it away or choose another --output"
        ) from error
    foreign = _foreign(place, {*files, MANIFEST})
    if foreign is not None:
        raise RequestError(
            f"--output {target}: holds {foreign}, which is not of the bundle there; move it or choose another"
        )
    for name, entry in files.items():
        try:
            check_file(place, name, entry)
        except CheckError as error:
            raise RequestError(
                f"--output {target}: {name} of the bundle there is missing or was changed since it was built; "
                "move the bundle away or choose another"
            ) from error
    return {**files, MANIFEST: hash_file(place / MANIFEST)}


def _check_kind(place: Path, target: Path) -> bool:
    """Whether a folder is there; refuses whatever else is there."""
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise RequestError(f"--output {target}: is a symbolic link; name the folder that it leads to")
    if not stat.S_ISDIR(mode):
        raise RequestError(f"--output {target}: is a file, and a bundle is a folder; choose another --output")
    return True


def _foreign(folder: Path, files: Collection[str]) -> str | None:
    """The first thing in a folder that is neither one of these files nor a folder of one.

    Raises:
        OSError: a folder can't be read, or nothing can be removed from it.
    """
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for parent, below, names in os.walk(folder, onerror=_raise):
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for path in sorted(Path(parent, name) for name in (*below, *names)):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or name not in (folders if path.is_dir() else files):
                return name
    return None


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_movable(place: Path, folder: Path, target: Path) -> None:
    """Refuses a folder that can't be moved: before anything is built, by a move that fails in every case."""
    if not os.path.lexists(place):
        return
    try:
        place.rename(folder)  # which holds the lock, and nothing replaces a folder that is not empty
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise RequestError(f"--output {target}: is a mount point; name a new folder in it") from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _make_parents(place: Path, made: list[Path]) -> None:
    for parent in reversed([parent for parent in place.parents if not parent.exists()]):
        with contextlib.suppress(FileExistsError):  # another build came first
            parent.mkdir()
            made.append(parent)


def _replace(folder: Path, place: Path, target: Path, before: _Files) -> None:
    """Puts the new bundle into its place if what was found there before is there still."""
    _check_same(place, target, before)
    if not before:
        if os.name == "nt" and place.exists():
            place.rmdir()  # elsewhere the move replaces an empty folder, and only an empty one
        (folder / NEW).rename(place)
        return
    new, old = folder / _OTHER, folder / _OTHER
    (folder / NEW).rename(new)
    if not exchange(new, place):
        old = folder / _OLD
        place.rename(old)
        new.rename(place)
    try:
        # What came into it since the last look can come no more: nobody finds the folder here.
        _check_same(old, target, before)
    except RequestError:
        if not exchange(old, place):
            place.rename(new)
            old.rename(place)
        raise
    _remove(old, before)


def _check_same(place: Path, target: Path, before: _Files) -> None:
    if _look(place, target) != before:
        raise RequestError(f"--output {target}: was changed while this was built, and is left so; choose another")


def _settle(folder: Path, place: Path) -> None:
    """Ends a replacement that was cut off: one of the two bundles is in its place, and the other is removed."""
    old, other = folder / _OLD, folder / _OTHER
    if old.exists() and not os.path.lexists(place):
        old.rename(place)
    for left in (old, other):
        if left.exists():
            _remove(left, _whole_files(left))


def _whole_files(folder: Path) -> Iterator[str]:
    """Of a bundle that was being removed, the files that are there and what its manifest says; that comes last."""
    if not (folder / MANIFEST).exists():
        return
    try:
        files = listed_files(folder)
    except CheckError:
        return
    for name, entry in files.items():
        with contextlib.suppress(CheckError):
            check_file(folder, name, entry)
            yield name
    yield MANIFEST


def _remove(folder: Path, files: Iterator[str] | _Files) -> None:
    for name in files:
        (folder / name).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)
    if folder.exists():
        raise RequestError(
            f"{folder}: holds files that came into a bundle while a new one took its place, which is there now; "
            "move them away and remove the folder"
        )
