"""Traces that builds of one configuration share: tracing takes most of a tiny build, and does not see the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edifice_export.graph import trace as tracing

__all__ = ["SharedTraces"]

Places = dict[str, np.ndarray]
"""Of initializers that are made of weights, the place of each element among all weights."""


class SharedTraces:
    """Abstract graphs by what they were traced of but for weights, which are put in afterwards.

    A trace copies numbers of the module to initializers, transposed or stacked. It is taken once of a module whose
    numbers all differ, so that each element of an initializer tells which number it is. Were one computed instead, the
    graph would be wrong for the next weights, and verification would fail.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[ir.Model, Places]] = {}
        self._real = tracing.trace

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Has builds take their traces from here."""
        with mock.patch.object(tracing, "trace", self._trace):
            yield

    def _trace(self, module: Any, inputs: Any, outputs: Any, opset: int, name: str, sizes: Any) -> ir.Model:
        key = (type(module), module.config, module.numerics, tuple(inputs), tuple(outputs), opset, name)
        if key not in self._known:
            self._known[key] = self._traced(module, inputs, outputs, opset, name, sizes)
        known, places = self._known[key]
        model = known.clone()
        numbers = _numbers(module)
        for initializer, place in places.items():
            value = model.graph.initializers[initializer]
            value.const_value = ir.tensor(numbers[place].reshape(place.shape), name=initializer)
        return model

    def _traced(self, module: nn.Module, *arguments: Any) -> tuple[ir.Model, Places]:
        numbers = _numbers(module)
        # None is a number that stands in a module's code, such as 0.5 or 1.
        distinct = np.linspace(0.5013, 1.4971, len(numbers), dtype=np.float32)
        assert len(np.unique(distinct)) == len(numbers)
        distinct = np.random.default_rng(0).permutation(distinct)
        # In place, and back again: what is finished in it is bound to this module.
        _set_numbers(module, distinct)
        traced = self._real(module, *arguments)
        order = np.argsort(distinct)
        places = {}
        for name, value in traced.graph.initializers.items():
            array = value.const_value.numpy().copy() if value.const_value is not None else np.zeros(0)
            value.const_value = ir.tensor(array, name=name)  # of its own: it may share the module's memory
            if array.dtype == np.float32 and array.size:
                place = order[np.searchsorted(distinct, array, sorter=order).clip(max=len(order) - 1)]
                if np.array_equal(distinct[place], array):
                    places[name] = place
        _set_numbers(module, numbers)
        return traced, places


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer of floating point."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]


def _numbers(module: nn.Module) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in _tensors(module)])


def _set_numbers(module: nn.Module, numbers: np.ndarray) -> None:
    tensors = _tensors(module)
    with torch.no_grad():
        for tensor, part in zip(tensors, np.split(numbers, np.cumsum([t.numel() for t in tensors])[:-1]), strict=True):
            tensor.copy_(torch.from_numpy(part).view(tensor.shape))
