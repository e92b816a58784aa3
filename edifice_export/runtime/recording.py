"""Recordings in and results out: files of any length, read and written through memory maps."""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..arguments import whole_number
from ..errors import ExportError, RequestError, brief
from ..values import MAX_MAGNITUDE, first_beyond, why_beyond
from ..writing.files import check_output, replacing
from .csv_recording import CsvLines, unpack_csv
from .tensor_file import check_expansion

__all__ = ["Recording", "check_room", "iter_windows", "open_output", "open_recording", "window_starts"]

Frames = NDArray[np.float32]

_HEAD = 1 << 14  # bytes; any header numpy accepts is shorter


class Recording(NamedTuple):
    """Frames of a file.

    Attributes:
        frames: read-only and memory-mapped, [batch, frames, width].
        batched: whether the file had the batch dimension.
        lines: which lines of a .csv were taken as what; None of other files.
    """

    frames: Frames
    batched: bool
    lines: CsvLines | None


@contextmanager
def open_recording(
    path: Path, width: int, name: str = "state_sequence", admit: Callable[[tuple[int, ...]], None] | None = None
) -> Iterator[Recording]:
    """Opens a .npy, .npz or .csv file of float32 [frames, width] or [batch, frames, width], in bounded memory.

    A .npz member or a .csv is first unpacked to a temporary file, which is gone when the context ends.

    Args:
        path: the file; its extension says its format.
        width: channels a frame must have.
        name: which array of a .npz to take where it holds several.
        admit: called with the shape that a header states, before anything is unpacked; may refuse it.

    Raises:
        RequestError: the file is missing, unreadable, damaged or not such an array.
    """
    with ExitStack() as stack:
        with _refusing(f"can't read {path}", "check the file, or save it again"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edifice-export-"))
            frames, lines = _map(path, width, name, Path(folder, "unpacked"), admit or (lambda _: None))
        yield Recording(frames if frames.ndim == 3 else frames[None], frames.ndim == 3, lines)


def window_starts(frames: int, window: int, stride: int) -> range:
    """First frames of the windows over a recording.

    Args:
        frames: length of the recording.
        window: length of a window; a shorter recording is one window.
        stride: frames from one window to the next. Frames after the last whole window are in none.

    Raises:
        RequestError: stride is below 1.
    """
    stride = whole_number("stride", stride, 1)
    return range(0, max(frames - window, 0) + 1, stride)


def iter_windows(frames: Frames, window: int, stride: int, chunk: int) -> Iterator[Frames]:
    """Cuts a recording into windows, all of batch entry 0 first, then all of entry 1, and so on.

    Args:
        frames: [batch, frames, width], of any length: only a chunk is in memory.
        window: length of a window, at most the recording's.
        stride: frames from one window to the next.
        chunk: most windows at a time; a chunk may span batch entries.

    Yields:
        Contiguous [n, min(frames, window), width], with n = chunk but for the last.

    Raises:
        RequestError: stride is below 1, or a window has a value that isn't finite or is beyond MAX_MAGNITUDE.
    """
    length = frames.shape[1]
    starts = window_starts(length, window, stride)
    views = np.lib.stride_tricks.sliding_window_view(frames, min(window, length), axis=1)[:, ::stride].swapaxes(2, 3)
    total = len(frames) * len(starts)
    for first in range(0, total, chunk):
        entry, turn = np.divmod(np.arange(first, min(first + chunk, total)), len(starts))
        windows = np.ascontiguousarray(views[entry, turn])
        odd = first_beyond(windows, MAX_MAGNITUDE)
        if odd is not None:
            n, frame, channel = odd
            place, value = f"[{entry[n]}, {starts[turn[n]] + frame}, {channel}]", windows[odd]
            raise RequestError(f"at [batch, frame, channel] = {place} it is {value:g}; {why_beyond(value)}")
        yield windows


@contextmanager
def open_output(path: Path, shape: tuple[int, ...]) -> Iterator[Frames]:
    """Makes a memory-mapped .npy file to fill; it appears whole, when the context ends, or not at all.

    Args:
        path: the file; one that exists is replaced.
        shape: of the float32 array in it, zeros at first.

    Raises:
        RequestError: path is no place for a .npy file, or the disk has no room for it.
    """
    if path.suffix.lower() != ".npy":
        raise RequestError(f"the output is a .npy file; {path} has the extension {path.suffix!r}; name it *.npy")
    size = math.prod(shape) * 4
    refusing = f"can't write {size} bytes to {path}", "make room or name another place"
    with ExitStack() as stack:
        with _refusing(*refusing):
            check_output(path)
            check_room(path, shape)
            unfinished = stack.enter_context(replacing(path))
            output = npy.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a write without blocks on a full disk is SIGBUS
                with unfinished.open("r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, unfinished.stat().st_size)
        yield output
        with _refusing(*refusing):
            output.flush()
            stack.close()


def check_room(path: Path, shape: tuple[int, ...]) -> None:
    """Refuses an output of float32 for which its disk has no room.

    Raises:
        RequestError: says how much it takes.
    """
    size = math.prod(shape) * 4
    with _refusing(f"can't write {size} bytes to {path}", "make room or name another place"):
        if size > (free := shutil.disk_usage(path.parent).free):
            raise RequestError(f"{path} takes {size} bytes; {free} are free on its disk; make room or name another")


@contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    """Makes whatever goes wrong a one-line RequestError."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # numpy's header parser, zipfile and zlib raise a dozen types on damaged files
        raise RequestError(f"{what} ({type(error).__name__}: {brief(error)}); {remedy}") from error


def _map(
    path: Path, width: int, name: str, unpacked: Path, admit: Callable[[tuple[int, ...]], None]
) -> tuple[Frames, CsvLines | None]:
    """A checked memory map, [frames, width] or [batch, frames, width], of the file or of what it unpacks to."""
    if not path.is_file():
        found = "is a folder or a device" if path.exists() else "does not exist"
        raise RequestError(f"the recording must be a file; {path} {found}; check the path")
    if path.stat().st_size == 0:
        raise RequestError(f"the recording {path} is an empty file; save it again")
    match path.suffix.lower():
        case ".npy":
            return _map_npy(path, width, admit), None
        case ".npz":
            return _map_npz(path, width, name, unpacked, admit), None
        case ".csv":
            lines = unpack_csv(path, width, unpacked)
            return np.memmap(unpacked, dtype=np.float32, mode="r").reshape(-1, width), lines
        case other:
            raise RequestError(f"a recording is .npy, .npz or .csv; {path} has the extension {other!r}; convert it")


def _map_npy(path: Path, width: int, admit: Callable[[tuple[int, ...]], None]) -> Frames:
    with path.open("rb") as stream:
        admit(_check_header(stream.read(_HEAD), path.stat().st_size, width, str(path)))
    return npy.open_memmap(path, mode="r")


def _map_npz(path: Path, width: int, name: str, unpacked: Path, admit: Callable[[tuple[int, ...]], None]) -> Frames:
    with zipfile.ZipFile(path) as archive:
        member = _choose(archive, path, name)
        with archive.open(member) as source, unpacked.open("wb") as copy:
            head = source.read(_HEAD)
            admit(_check_header(head, member.file_size, width, f"{member.filename!r} in {path}"))
            check_expansion(path, member.file_size)
            if member.file_size > (free := shutil.disk_usage(unpacked.parent).free):
                raise RequestError(f"{path} unpacks to {member.file_size} bytes; TMPDIR has {free}; set a roomier one")
            copy.write(head)
            shutil.copyfileobj(source, copy)
    return _map_npy(unpacked, width, admit)


def _choose(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    """The one array of a .npz, or the one with this name."""
    arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    chosen = [member for member in arrays if member.filename == f"{name}.npy"] or arrays
    if len(chosen) != 1:
        found = ", ".join(repr(member.filename.removesuffix(".npy")) for member in arrays) or "none"
        raise RequestError(f"{path} must hold one array, or one named {name!r}; it holds: {found}; save that one alone")
    # zipfile bounds what it inflates at a time for these only; numpy writes no others.
    if chosen[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RequestError(f"{path} must be stored or deflated; it is compressed otherwise; save it with np.savez")
    return chosen[0]


def _check_header(head: bytes, size: int, width: int, source: str) -> tuple[int, ...]:
    """The shape of a .npy; refuses one by its first bytes and its size, before anything is unpacked or mapped."""
    stream = io.BytesIO(head)
    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype != np.dtype(np.float32):
        raise RequestError(f"{source} must be native float32; it is {dtype}; convert it with x.astype(np.float32)")
    found = f"it has the shape {list(shape)}"
    if len(shape) not in (2, 3) or shape[-1] != width:
        raise RequestError(f"{source} must be [frames, {width}] or [batch, frames, {width}]; {found}; reshape it")
    if min(shape) < 1:
        raise RequestError(f"{source} must have a frame or more; {found}; record some")
    if stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise RequestError(f"{source} is damaged or truncated: {found}, which {size} bytes don't match; save it again")
    return tuple(shape)
