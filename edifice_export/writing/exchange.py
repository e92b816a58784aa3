"""Exchange: two files or folders change places in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux; macOS has the same number for its RENAME_SWAP
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system or a kernel says that does not know how."""


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change what they name, at no moment with nothing there; says whether that can be done here.

    Raises:
        OSError: it can be done here, and not with these.
    """
    swap = _swap()
    if swap is None:
        return False
    ctypes.set_errno(0)
    if swap(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    """The system's call, if it has one: Linux and macOS have."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda one, other: int(library.renamex_np(one, other, _RENAME_EXCHANGE))
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return lambda one, other: int(library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE))
    return None
