"""What torch.save writes, .pt, .pth, .bin and .ckpt: a zip archive of a pickle, with names and shapes, and raw numbers.

torch.load(weights_only=True) makes tensors and plain containers of it and runs nothing that the file names; it is never
read in another way. It believes sizes, so these are looked at before and after.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import brief
from .error import FormatError
from .state_dict import read_state_dict

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_pickled"]

_MAX_PICKLE = 2**24
"""Bytes of the pickle, which holds no numbers: those of ten thousand tensors take two million."""

_REMEDY = "where you trust it, load it and save the model's state_dict() alone"


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, mapped and not read.

    Raises:
        FormatError: the file is damaged, is something else, or asks for more than tensors; the message says for what.
    """
    import torch

    try:
        _check_archive(path)
    except FormatError:
        raise
    except Exception as error:  # on a damaged archive zipfile raises half a dozen types
        raise FormatError(f"damaged, truncated or not of torch.save ({brief(error)}); copy it again") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a pickle makes torch raise
        raise FormatError(_why_not(path, error)) from error
    tensors = read_state_dict(found)
    _check_room(path, tensors)
    return tensors


def _check_archive(path: Path) -> None:
    """Refuses what is no archive of torch's, expands, or is not what its checksums say."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        inner = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "data.pkl" not in inner:
            raise FormatError("is a zip archive and not of torch.save; give a model's state_dict(), saved by that")
        if "constants.pkl" in inner:
            raise FormatError(f"is TorchScript, which is a program; {_REMEDY}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise FormatError("is compressed, which torch.save never does; save it again")
        held, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if held > size:
            raise FormatError(f"is an archive of {held} bytes in {size}; save it again")
        if inner["data.pkl"].file_size > _MAX_PICKLE:
            raise FormatError(f"has a pickle of more than {_MAX_PICKLE} bytes beside its numbers; {_REMEDY}")
        damaged = archive.testzip()
    if damaged is not None:
        raise FormatError(f"{damaged} in it is not what its checksum says; copy or save the file again")


def _check_room(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses tensors that are larger than what the file holds for them."""
    storages = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise FormatError(
                f"{name:.100} is {list(tensor.shape)} over {storage.nbytes()} bytes, which repeat; save it contiguous"
            )
    if sum(storages.values()) > path.stat().st_size:
        raise FormatError("claims more numbers than it holds; save it again")


def _why_not(path: Path, error: Exception) -> str:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        asked = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # as above; what torch.load said will do
        asked = []
    if asked:
        more = f" and {len(asked) - 3} more" if len(asked) > 3 else ""
        return (
            f"its pickle asks for {', '.join(f'{name:.100}' for name in asked[:3])}{more}, and nothing that a file "
            f"names is run; {_REMEDY}"
        )
    # Of torch's advice only what was wrong.
    said = re.sub(r"\x1b\[\d*m", "", str(error)).rpartition("WeightsUnpickler error:")[2].partition("\n\nCheck")[0]
    return f"torch.load refuses it: {brief(said.strip() or error)}; save the model's state_dict() again"
