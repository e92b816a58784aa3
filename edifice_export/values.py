"""What inputs may hold, and what they are tried with: random numbers of the kind of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .specification import InputSpec

__all__ = ["MAX_MAGNITUDE", "Arrays", "draw", "first_beyond", "why_beyond"]

Arrays = dict[str, np.ndarray]
"""Tensors by name."""

MAX_MAGNITUDE = 1e12
"""The largest number, and the smallest negated, that a frame may hold; `verify` goes up to it.

Layer norms square what the first layer makes of a frame: from 1.8e19 on the squares leave float32, and the output is
zero or NaN. Ten million are left for what weights, added up over a frame, and sums of squares make of it.
"""


def draw(
    spec: InputSpec, sizes: Mapping[str, int], generator: np.random.Generator, magnitude: float = 1.0
) -> np.ndarray:
    """An input of the given sizes.

    Args:
        spec: its type, shape and values.
        sizes: a number for each of its symbols.
        generator: where the numbers come from.
        magnitude: what normal numbers are multiplied by.
    """
    shape = [size for size in spec.at(sizes) if size is not None]
    assert len(shape) == len(spec.shape), f"{spec} at {dict(sizes)}"
    match spec.values.kind:
        case "normal":
            return (generator.standard_normal(shape) * magnitude).astype(spec.dtype)
        case "ids" | "integers":
            return generator.integers(0, spec.values.below or 2, shape).astype(spec.dtype)
        case "mask":
            seen = generator.integers(1, shape[-1], (*shape[:-1], 1), endpoint=True)
            return (np.arange(shape[-1]) < seen).astype(spec.dtype)


def first_beyond(array: np.ndarray, limit: float) -> tuple[int, ...] | None:
    """The place of the first number that is a NaN, infinite, or further from zero than a limit; None without one."""
    if float(np.abs(array).max(initial=0)) <= limit:  # a NaN is not
        return None
    return tuple(int(index) for index in np.argwhere(~(np.abs(array.astype(np.float64)) <= limit))[0])


def why_beyond(value: float) -> str:
    """Why a number of a frame is refused, and what to do."""
    if not np.isfinite(value):
        return "give finite numbers only"
    return f"numbers up to {MAX_MAGNITUDE:g} are taken, beyond which float32 may overflow; scale or mend the input"
