"""What goes into a graph is checked before it does, and what comes out before it is believed."""

from __future__ import annotations

import numpy as np

from ..errors import NotFiniteError, RequestError
from ..specification import TensorSpec

__all__ = ["MAX_MAGNITUDE", "check_array", "check_finite", "first_beyond", "why_beyond"]

MAX_MAGNITUDE = 1e12
"""The largest number, and the smallest negated, that a frame may hold; `verify` goes up to it.

Layer norms square what the first layer makes of a frame: from 1.8e19 on the squares leave float32, and the output is
zero or NaN. Ten million are left for what weights, added up over a frame, and sums of squares make of it.
"""


def check_array(array: np.ndarray, spec: TensorSpec) -> None:
    """Refuses an array that is not what the graph takes, with or without the batch axis.

    Raises:
        RequestError: names the tensor, what was expected and what was found.
    """
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise RequestError(f"{spec.name} should be a numpy array {spec}, got {type(array).__name__}; convert it")
    width = spec.shape[-1]
    expected = f"{spec} or [{', '.join(map(str, spec.shape[1:]))}]"
    if array.ndim not in (len(spec.shape), len(spec.shape) - 1) or array.shape[-1] != width:
        raise RequestError(f"{spec.name}: expected {expected}, got shape {list(array.shape)}")
    if array.dtype != np.dtype(spec.dtype):
        raise RequestError(
            f"{spec.name}: expected {expected}, got {array.dtype}; convert it with .astype(np.{spec.dtype})"
        )
    if 0 in array.shape:
        raise RequestError(f"{spec.name}: expected {expected}, got shape {list(array.shape)}, which holds nothing")
    place = first_beyond(array, MAX_MAGNITUDE)
    if place is not None:
        frame = f" in frame {place[-2]}" if len(spec.shape) == 3 else ""
        value = array[place]
        raise RequestError(f"{spec.name}: holds {value:g} at {list(place)}{frame}; {why_beyond(value)}")


def first_beyond(array: np.ndarray, limit: float) -> tuple[int, ...] | None:
    """The place of the first number that is a NaN, infinite, or further from zero than a limit; None without one."""
    if np.abs(array).max() <= limit:  # a NaN is not
        return None
    return tuple(int(index) for index in np.argwhere(~(np.abs(array) <= limit))[0])


def why_beyond(value: float) -> str:
    """Why a number of a frame is refused, and what to do."""
    if not np.isfinite(value):
        return "give finite numbers only"
    return f"numbers up to {MAX_MAGNITUDE:g} are taken, beyond which float32 may overflow; scale or mend the input"


def check_finite(output: np.ndarray, name: str, consequence: str = "") -> None:
    """Refuses what a graph gave if it is not finite.

    Args:
        output: float32 [batch, ...].
        name: what messages call it.
        consequence: what the error means for the caller, if anything.

    Raises:
        NotFiniteError: names the first entry of the batch whose output is not.
    """
    finite = np.isfinite(output)
    if not finite.all():
        entry = int(np.argwhere(~finite)[0, 0])
        raise NotFiniteError(
            f"{name}: is not finite for entry {entry} of the batch: float32 overflows in this model on these frames"
            f"{consequence}; scale them down, or mend the weights",
            entry,
        )
