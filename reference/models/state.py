"""What a model carries from frame to frame: plain named tensors, `<layer>.<kind>`; within one layer, `<kind>`.

    ssm         state of a recurrence          key, value   rings of the last window's keys and values
    conv        frames that a short            long_conv    what each order's long convolution has seen
                convolution still sees         position     frames seen so far: one for all layers, under layer 0

The first axis is the batch, of which every entry goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["POSITION", "State", "input_free", "kind_of", "of_layer"]

State = dict[str, Tensor]

POSITION = "0.position"
"""Every layer that has a ring reads it; the model counts it on."""

Method = TypeVar("Method", bound=Callable[..., Any])


def kind_of(name: str) -> str:
    """`ssm` of `3.ssm`."""
    return name.partition(".")[2]


def of_layer(state: Mapping[str, Tensor], layer: int) -> State:
    """The part of a state, or of constants, that one layer reads, by kind."""
    own = {kind_of(name): value for name, value in state.items() if name.partition(".")[0] == str(layer)}
    return {**own, "position": state[POSITION]} if POSITION in state else own


def input_free(method: Method) -> Method:
    """Marks a method without arguments whose result depends on parameters alone: a graph may hold the result."""
    method.input_free = True  # type: ignore[attr-defined]
    return method
