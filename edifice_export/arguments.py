"""What every entry checks of what it is given: whole numbers, and names that native libraries can open."""

from __future__ import annotations

import math
import operator
from pathlib import Path
from typing import Any

from .errors import RequestError

__all__ = ["check_name", "whole_number"]


def whole_number(what: str, value: Any, least: int, most: float = math.inf) -> int:
    """An integer in a range, of Python's or numpy's types; a truth value is none.

    Raises:
        RequestError: says the range and what was found.
    """
    number = None
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # numpy's, which may be absent
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None or not least <= number <= most:
        upward = f"to {_power(most)}" if most < math.inf else "upward"
        raise RequestError(f"{what} must be an integer from {least} {upward}, got {value!r:.80}")
    return number


def _power(number: float) -> str:
    """A number in words: 2^63 - 1 as such."""
    exponent = int(number).bit_length()
    return f"2^{exponent} - 1" if number == 2**exponent - 1 and exponent > 32 else str(number)


def check_name(path: Path, what: str) -> None:
    """Refuses a path that ONNX and ONNX Runtime can't open: they take names that are UTF-8.

    Args:
        path: of a file or folder.
        what: it is, such as `bundle`.

    Raises:
        RequestError: names the path.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} {path}: is not UTF-8 in this locale, and the libraries that open it take no such name; rename it, "
            "or set a UTF-8 locale, such as LC_ALL=C.UTF-8"
        ) from error
