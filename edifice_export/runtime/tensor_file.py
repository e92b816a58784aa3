"""Tensors in and out of files: .npz by name, .npy of a single one. Sizes are looked at before anything is read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import RequestError, brief
from ..machine import physical_memory
from ..writing.files import check_output, replacing

__all__ = ["check_expansion", "check_tensor_output", "read_tensors", "write_tensors"]

_EXPANDED, _EXPANSION = 2**28, 100
"""Bytes that a .npz may unpack to whatever its size, and how many times its size besides: recordings compress less."""


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors of a file, by name.

    Args:
        path: .npz with these names, others in it being none of ours; or .npy where there is one name.
        names: of what is wanted.

    Raises:
        RequestError: no such file, another format, a name missing, damaged, or larger than memory.
    """
    wanted = ", ".join(names)
    if not path.is_file():
        raise RequestError(f"{path}: there is no such file; give a .npz with {wanted}")
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz") or (kind == ".npy" and len(names) > 1):
        raise RequestError(f"{path}: this bundle takes {wanted}; give a .npz with an array of each name")
    try:
        if kind == ".npy":
            _check_size(path, path.stat().st_size)
            return {names[0]: np.load(path, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            missing = [name for name in names if name not in members]
            if missing:
                raise RequestError(
                    f"{path}: holds {', '.join(members) or 'nothing'}, and no {missing[0]}; give {wanted}"
                )
            size = sum(members[name].file_size for name in names)
            check_expansion(path, size)
            _check_size(path, size)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: can't be read: {brief(error)}; save it again with np.savez") from error


def check_expansion(path: Path, size: int) -> None:
    """Refuses a .npz that unpacks to much more than it is.

    Raises:
        RequestError: says to how much.
    """
    held = path.stat().st_size
    if size > _EXPANDED + _EXPANSION * held:
        raise RequestError(
            f"{path} unpacks to {size} bytes from {held}, more than {_EXPANSION} times its size; save it uncompressed, "
            "with np.savez, if it is a recording"
        )


def _check_size(path: Path, size: int) -> None:
    memory = physical_memory()
    if memory is not None and size > memory:
        raise RequestError(f"{path}: holds {size} bytes, more than this machine's memory; give less at once")


def check_tensor_output(path: Path, names: Sequence[str]) -> None:
    """Refuses a place that can't hold these outputs, before they are computed.

    Raises:
        RequestError: another format, or no place for a file.
    """
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz") or (kind == ".npy" and len(names) > 1):
        raise RequestError(f"--output {path}: this bundle gives {', '.join(names)}; name a .npz file")
    check_output(path)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors, whole or not at all: .npz by name, or .npy of the only one.

    Raises:
        RequestError: see check_tensor_output.
    """
    check_tensor_output(path, [*tensors])
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        if path.suffix.lower() == ".npy":
            (array,) = tensors.values()
            np.save(file, array)
        else:
            np.savez(file, **dict(tensors))  # type: ignore[arg-type]
