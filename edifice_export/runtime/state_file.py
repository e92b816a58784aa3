"""The state of a stream in a file: safetensors that say whose state it is. Nothing in a file is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from ..specification import PAST, StateSpec
from ..values import first_beyond
from ..writing.files import replacing

__all__ = ["MAX_STATE", "read_state", "write_state"]

Tensors = dict[str, np.ndarray]

MAX_STATE = 1e6
"""The largest number, and the smallest negated, that a state in a file may hold.

Blocks read normalised frames, so that states of trained models are below 100. A model multiplies up to four numbers of
its states, and layer norms square what that gives: from 1e8 on, outputs of Hymba are zero.
"""

_MAX_POSITION = 2**62
"""Frames that no stream has seen; counting on from there would not overflow for as long again."""

_FORMAT = "edifice-export stream state 1"


def write_state(target: Path, tensors: Tensors, names: Mapping[str, str]) -> None:
    """Writes a state to a file, whole or not at all.

    Args:
        target: the file; one that exists is replaced.
        tensors: of the state, by name.
        names: what tells whose state it is.

    Raises:
        RequestError: the state is one that `read_state` would refuse, or the file can't be written.
    """
    encode, _ = _safetensors()
    for name, tensor in tensors.items():
        if _place_beyond(tensor) is not None:
            raise RequestError(
                f"state {target}: {name} is not finite or beyond {MAX_STATE:g}: this model overflows on such frames; "
                "reset, restore or rewind the stream"
            )
    data = encode(tensors, {"format": _FORMAT, **names})
    with replacing(target) as unfinished:
        unfinished.write_bytes(data)


def read_state(path: Path, names: Mapping[str, str], states: Sequence[StateSpec], batch: int) -> Tensors:
    """Reads a state that `write_state` wrote.

    Args:
        path: the file.
        names: what it must say of whose state it is.
        states: what it must hold.
        batch: how many streams side by side.

    Raises:
        RequestError: the file can't be read, is damaged, or holds a state of another bundle or batch, states that grow
            and are not of one length, or numbers that no stream has: not finite, or beyond MAX_STATE.
    """
    _, decode = _safetensors()
    metadata, tensors = decode(path)
    if metadata.get("format") != _FORMAT:
        raise RequestError(f"state {path}: is not the state of a stream; give a file that `save` wrote")
    for key, expected in names.items():
        if metadata.get(key) != expected:
            raise RequestError(
                f"state {path}: is of another bundle: its {key} is {metadata.get(key)!r}, and this one's is "
                f"{expected!r}; load it into the bundle that it was saved from"
            )
    _check(tensors, states, batch, path)
    return tensors


def _check(tensors: Tensors, states: Sequence[StateSpec], batch: int, path: Path) -> None:
    expected = {state.name for state in states}
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise RequestError(f"state {path}: its tensors are not those of this bundle's states: {', '.join(odd[:4])}")
    past = next((_past(tensors[state.name], state) for state in states if state.grows), 0)
    for state in states:
        tensor, shape = tensors[state.name], state.of(batch, past)
        if (str(tensor.dtype), tensor.shape) != (state.dtype, shape):
            raise RequestError(
                f"state {path}: {state.name} should be {state.dtype} {list(shape)} for this stream, found "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        place = _place_beyond(tensor)
        if place is not None:
            limits = f"0 to {_MAX_POSITION}" if tensor.dtype == np.int64 else f"up to {MAX_STATE:g}"
            raise RequestError(
                f"state {path}: {state.name} holds numbers that no stream has, {tensor[place]:g} at {list(place)} and "
                f"not {limits}; the file is damaged, save it again"
            )


def _past(tensor: np.ndarray, state: StateSpec) -> int:
    """How many frames a state that grows has seen, as far as its shape can say."""
    axis = state.shape.index(PAST)
    return tensor.shape[axis] if axis < tensor.ndim else 0


def _place_beyond(tensor: np.ndarray) -> tuple[int, ...] | None:
    if tensor.dtype != np.int64:
        return first_beyond(tensor, MAX_STATE)
    odd = np.argwhere((tensor < 0) | (tensor > _MAX_POSITION))
    return tuple(map(int, odd[0])) if len(odd) else None


def _safetensors() -> tuple[Any, Any]:
    """Encoding and decoding of safetensors, in numpy."""
    try:
        import safetensors
        from safetensors.numpy import save
    except ImportError as error:
        raise RequestError(
            f"states are safetensors files: {error}; install it with `pip install safetensors`"
        ) from error

    def decode(path: Path) -> tuple[dict[str, str], Tensors]:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return dict(file.metadata() or {}), tensors
        except (OSError, safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"state {path}: can't be read: {error}; give a file that `save` wrote") from error

    return save, decode
