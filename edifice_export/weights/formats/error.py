"""What every reader of weights files raises, whatever the bytes."""

from __future__ import annotations

__all__ = ["FormatError"]


class FormatError(ValueError):
    """Bytes that are damaged or not of their format, or tensors that a format can't hold.

    The message says what is wrong, where (a byte or a tensor's name) and what to do, but not in which file: readers
    take bytes, and whoever read them from a file adds its path.
    """
