"""What goes into a graph is checked before it does, and what comes out before it is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import NotFiniteError, RequestError
from ..specification import InputSpec, OutputSpec, Size
from ..values import MAX_MAGNITUDE, first_beyond, why_beyond

__all__ = ["batch_symbol", "check_array", "check_finite", "check_sizes"]

Limits = Mapping[str, tuple[int, int | None]]


def batch_symbol(inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec]) -> str | None:
    """The free size that all of these begin with: of entries that have nothing to do with each other."""
    firsts = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
    first = firsts.pop() if len(firsts) == 1 else None
    return first.symbol if isinstance(first, Size) else None


def check_array(array: np.ndarray, spec: InputSpec, single: bool = True) -> None:
    """Refuses an array that is not what the graph takes.

    Args:
        array: what was given.
        spec: what it should be.
        single: whether the first axis may be left out, that of the batch.

    Raises:
        RequestError: names the tensor, what was expected and what was found.
    """
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise RequestError(f"{spec.name} should be a numpy array {spec}, got {type(array).__name__}; convert it")
    sizes = spec.shape[max(0, len(spec.shape) - array.ndim) :]
    fits = len(sizes) == array.ndim >= len(spec.shape) - single and all(
        isinstance(size, Size) or size == found for size, found in zip(sizes, array.shape, strict=True)
    )
    if not fits:
        raise RequestError(f"{_expected(spec, single)}, got shape {list(array.shape)}")
    if array.dtype != np.dtype(spec.dtype):
        raise RequestError(f"{_expected(spec, single)}, got {array.dtype}; convert it with .astype(np.{spec.dtype})")
    if 0 in array.shape:
        raise RequestError(f"{_expected(spec, single)}, got shape {list(array.shape)}, which holds nothing")
    _check_values(array, spec)


def _expected(spec: InputSpec, single: bool) -> str:
    alone = f" or [{', '.join(map(str, spec.shape[1:]))}]" if single else ""
    return f"{spec.name}: expected {spec}{alone}"


def _check_values(array: np.ndarray, spec: InputSpec) -> None:
    if spec.values.kind == "normal" and (place := first_beyond(array, MAX_MAGNITUDE)) is not None:
        frame = f" in frame {place[-2]}" if len(spec.shape) == 3 else ""
        value = array[place]
        raise RequestError(f"{spec.name}: holds {value:g} at {list(place)}{frame}; {why_beyond(value)}")
    if spec.values.kind == "ids" and spec.values.below is not None:
        odd = np.argwhere((array < 0) | (array >= spec.values.below))
        if len(odd):
            value = array[tuple(odd[0])]
            raise RequestError(
                f"{spec.name}: holds {value} at {odd[0].tolist()}; there are 0 to {spec.values.below - 1}, give those"
            )


def check_sizes(arrays: Sequence[np.ndarray], specs: Sequence[InputSpec], limits: Limits) -> dict[str, int]:
    """The free sizes of whole inputs, by symbol.

    Raises:
        RequestError: sizes of one name differ, or one is beyond its limits.
    """
    sizes: dict[str, int] = {}
    for array, spec in zip(arrays, specs, strict=True):
        for size, found in zip(spec.shape, array.shape, strict=True):
            if not isinstance(size, Size) or size.symbol is None:
                continue
            known = sizes.setdefault(size.symbol, found)
            if known != found:
                raise RequestError(
                    f"{spec.name}: {size} is {found}, and {known} in what was given before; give the same everywhere"
                )
            least, most = limits.get(size.symbol, (1, None))
            if not least <= found <= (most or found):
                bound = f"at most {most}" if most is not None and found > most else f"{least} or more"
                raise RequestError(f"{spec.name}: {size} is {found}, and this model takes {bound}")
    return sizes


def check_finite(output: np.ndarray, name: str, consequence: str = "") -> None:
    """Refuses what a graph gave if it is not finite.

    Args:
        output: [batch, ...], or of whatever else the whole of it.
        name: what messages call it.
        consequence: what the error means for the caller, if anything.

    Raises:
        NotFiniteError: names the first entry of the batch whose output is not.
    """
    finite = np.isfinite(output)
    if not finite.all():
        entry = int(np.argwhere(~finite)[0, 0]) if output.ndim else 0
        raise NotFiniteError(
            f"{name}: is not finite for entry {entry} of the batch: float32 overflows in this model on these frames"
            f"{consequence}; scale them down, or mend the weights",
            entry,
        )
