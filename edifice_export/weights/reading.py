"""From a file, a folder or a state_dict to a checkpoint: which format it is, whose names, what it says of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edifice_reference.models.config import NUMERICS
from edifice_reference.models.registry import ARCHITECTURES, Architecture

from ..arguments import check_name
from ..errors import RequestError, brief
from ..machine import physical_memory
from .checkpoint import Checkpoint
from .formats.error import FormatError
from .formats.nx_checkpoint import fold_width, read_nx_checkpoint, spec_of
from .sources import OWN, SOURCES, source_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_checkpoint"]

FORMATS = (
    "safetensors or their index, what torch.save writes (.pt, .pth, .bin, .ckpt), Edifice's .nx checkpoints, or what "
    "Nx.serialize writes (.axon among it)"
)

_IN_FOLDER = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
"""What stands for a folder, the first that is there."""


def read_checkpoint(weights: Path | Mapping[str, Tensor]) -> Checkpoint:
    """Reads weights; of a file its bytes, not its name, say which format it is.

    Args:
        weights: a file; a folder with one of _IN_FOLDER; or a state_dict, of whose tensors no copies are made.

    Raises:
        RequestError: a file is missing, unreadable, damaged, larger than memory, of an unknown format, or says
            something that can't be used.
    """
    if not isinstance(weights, Path):
        return _read_state_dict(weights)
    check_name(weights, "weights")
    try:
        if not weights.exists():
            raise RequestError(f"weights {weights}: there is no such file; check the path")
        return _read(_in_folder(weights) if weights.is_dir() else weights)
    except FormatError as error:
        raise RequestError(f"weights {weights}: {error}") from error
    except OSError as error:
        raise RequestError(
            f"weights {weights}: can't be read: {error.strerror}; check the path and its rights"
        ) from error


def _read_state_dict(weights: Mapping[str, Tensor]) -> Checkpoint:
    from .formats.state_dict import read_state_dict

    try:
        return _checkpoint("state_dict", (), read_state_dict(weights))
    except FormatError as error:
        raise RequestError(f"weights state_dict: {error}") from error


def _in_folder(folder: Path) -> Path:
    for name in _IN_FOLDER:
        if (folder / name).exists():
            return folder / name
    raise FormatError(f"is a folder without {', '.join(_IN_FOLDER)}; give one with such a file, or {FORMATS}")


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise FormatError(f"is not a file; give {FORMATS}")
    _check_memory([path])
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise FormatError("the file is empty; copy it again")
    if start.startswith(b"nx"):
        from .formats.nx import read_nx

        return _checkpoint(path, [path], read_nx(path.read_bytes()), numerics="edifice")
    # After five bytes of header: Nx.serialize, zlib, or an Erlang term. In safetensors this is the 2^40s of a length.
    if start[0] in (0, 1) and start[5:6] in (b"n", b"\x78", b"\x83"):
        return _read_nx_checkpoint(path)
    # Text holds no zero, and the length that safetensors begin with ends in several.
    if start.lstrip().startswith(b"{") and b"\0" not in start:
        return _read_shards(path)
    if start[8:9] == b"{":
        from .formats.safetensors import read_safetensors

        return _with_metadata(path, [path], *read_safetensors(path))
    if start.startswith(b"PK\x03\x04"):
        from .formats.pickled import read_pickled

        return _checkpoint(path, [path], read_pickled(path))
    if start.startswith(b"\x80"):
        raise FormatError(
            "is a pickle as torch wrote it before 1.6, or somebody else's, which can run code; where you trust it, "
            "load it and save the model's state_dict() by torch.save or safetensors.torch.save_file"
        )
    raise FormatError(f"is of no known format, or damaged at its beginning; give {FORMATS}")


def _read_shards(index: Path) -> Checkpoint:
    from .formats.sharded import read_index, read_shards

    shards = read_index(index)
    _check_memory(shards)
    return _with_metadata(index, [index, *shards], *read_shards(shards))


def _read_nx_checkpoint(path: Path) -> Checkpoint:
    tensors, metadata = read_nx_checkpoint(path.read_bytes())
    spec = spec_of(metadata)
    if spec is None:
        return _checkpoint(path, [path], tensors, numerics="edifice")
    return _checkpoint(path, [path], tensors, _architecture(spec[0]), _rename_options(spec[1]), "edifice")


def _with_metadata(
    place: Path, files: Sequence[Path], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Checkpoint:
    architecture = _architecture(metadata["module"]) if "module" in metadata else None
    options = _parse_options(metadata["options"]) if "options" in metadata else None
    numerics = metadata.get("numerics")
    if numerics not in (None, *NUMERICS):
        raise FormatError(f"its metadata says numerics {numerics!r}, not {' or '.join(NUMERICS)}")
    return _checkpoint(place, files, tensors, architecture, options, numerics)


def _checkpoint(
    place: Path | str,
    files: Sequence[Path],
    found: Mapping[str, Tensor],
    architecture: Architecture | None = None,
    options: Mapping[str, Any] | None = None,
    numerics: str | None = None,
) -> Checkpoint:
    source, named = source_of(list(found))
    tensors = {name: found[in_file] for in_file, name in named.names.items()}
    numerics = numerics or source.numerics
    return Checkpoint(str(place), tuple(files), tensors, source, named.prefix, architecture, options, numerics)


def _check_memory(files: Sequence[Path] | Mapping[Path, Any]) -> None:
    """Refuses, before any is read, files of which no model can be made here."""
    size, memory = sum(file.stat().st_size for file in files), physical_memory()
    if memory is not None and size > memory:
        raise FormatError(
            f"has {size / 2**30:,.0f} GiB and this machine {memory / 2**30:,.0f} of memory; use a larger one"
        )


def _architecture(module: str) -> Architecture:
    for architecture in ARCHITECTURES.values():
        if any(module in source.titles(architecture) for source in (OWN, *SOURCES.values())):
            return architecture
    known = ", ".join(architecture.edifice_module for architecture in ARCHITECTURES.values())
    raise FormatError(f"made with {module!r}, which is not known here; known are {known}")


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its metadata `options` is not JSON: {brief(error)}") from error
    if not isinstance(options, dict):
        raise FormatError(f"its metadata `options` is not a JSON object but a {type(options).__name__}")
    return _rename_options(fold_width(options))


def _rename_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those of no value; `seq_len`, which Edifice takes in place of window_size, becomes that."""
    options = {name: value for name, value in options.items() if value is not None}
    if "seq_len" in options:
        options["window_size"] = options.pop("seq_len")
    return options
