"""What goes into a graph is checked before it does."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from ..specification import TensorSpec

__all__ = ["check_array"]


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
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        raise RequestError(f"{spec.name}: holds {array[tuple(place)]} at {place.tolist()}; give finite numbers only")
