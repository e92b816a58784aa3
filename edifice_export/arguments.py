"""What every entry checks of what it is given: types, numbers, and names that native libraries can open."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import RequestError

__all__ = [
    "callback",
    "check_name",
    "flag",
    "mapping",
    "path_of",
    "positive",
    "several",
    "text",
    "whole_number",
    "words",
]

F = TypeVar("F", bound=Callable[..., Any])


def whole_number(what: str, value: Any, least: int, most: float = math.inf) -> int:
    """An integer in a range, of Python's or numpy's types; a truth value is none.

    Raises:
        RequestError: says the range and what was found.
    """
    number = None
    if not _is_truth(value):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None or not least <= number <= most:
        upward = f"to {_power(most)}" if most < math.inf else "upward"
        raise RequestError(f"{what} must be an integer from {least} {upward}, got {value!r:.80}")
    return number


def positive(what: str, value: Any) -> float:
    """A finite number above zero.

    Raises:
        RequestError: says what was found.
    """
    number = float(value) if isinstance(value, numbers.Real) and not _is_truth(value) else math.nan
    if not 0 < number < math.inf:
        raise RequestError(f"{what} must be a positive number, got {value!r:.80}")
    return number


def flag(what: str, value: Any) -> bool:
    """True or False.

    Raises:
        RequestError: says what was found.
    """
    if not _is_truth(value):
        raise RequestError(f"{what} must be True or False, got {value!r:.80}")
    return bool(value)


def text(what: str, value: Any, among: Collection[str] = ()) -> str:
    """A text, one of these if there are any.

    Raises:
        RequestError: says which there are and what was found.
    """
    if not isinstance(value, str) or (among and value not in among):
        raise RequestError(f"{what} must be {', '.join(among) or 'text'}, got {value!r:.80}")
    return value


def words(what: str, value: Any) -> list[str]:
    """A text or several, as a list.

    Raises:
        RequestError: says what was found.
    """
    if isinstance(value, str):
        return [value]
    return [text(f"each of {what}", each) for each in several(what, value, "texts")]


def several(what: str, value: Any, of: str) -> list[Any]:
    """The entries of a list or another sequence, but not the letters of a text.

    Raises:
        RequestError: says what was found.
    """
    array = type(value).__name__ == "ndarray" and getattr(value, "ndim", 0) == 1  # numpy's, which may be absent
    if not array and (not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray))):
        raise RequestError(f"{what} must be a list of {of}, got {value!r:.80}")
    return list(value)


def mapping(what: str, value: Any, of: str) -> dict[str, Any]:
    """A dict whose keys are text.

    Raises:
        RequestError: says what was found.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} must be a dict of {of}, got {value!r:.80}")
    return {text(f"each name in {what}", name): each for name, each in value.items()}


def callback(what: str, value: F | None) -> F | None:
    """A function, or None.

    Raises:
        RequestError: says what was found.
    """
    if value is not None and not callable(value):
        raise RequestError(f"{what} must be a function, got {value!r:.80}")
    return value


def path_of(what: str, value: Any) -> Path:
    """A path, which need not exist.

    Raises:
        RequestError: says what was found.
    """
    name = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(name, str) or "\0" in name:
        raise RequestError(f"{what} must be a path, got {value!r:.80}")
    return Path(name)


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


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's, which may be absent


def _power(number: float) -> str:
    """A number in words: 2^63 - 1 as such."""
    exponent = int(number).bit_length()
    return f"2^{exponent} - 1" if number == 2**exponent - 1 and exponent > 32 else str(number)
