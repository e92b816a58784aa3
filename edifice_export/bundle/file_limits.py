"""What the files of a bundle are for, and so how large each can be: known before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..machine import physical_memory
from ..specification import TensorSpec
from .manifest import Manifest

__all__ = ["file_limits"]

_MAX_MODEL = 2**31
"""Bytes: protobuf's own limit."""

_HEADER, _HEADERS = 2**12, 2**24
"""Bytes beside the numbers of a tensor, and of all weights of 512 blocks: names, shapes, nodes."""

_COPIES = 4
"""Of each weight, and of each number that is made of weights, in a graph; ours hold one, and two in places."""

_TIMES, _MORE = 4, 8
"""What free sizes of test data are at most of those that graphs are made for, and how many more; ours are of batch 2,
and 2.5 windows long."""


def file_limits(manifest: Manifest) -> dict[str, int]:
    """The most bytes of each file that a bundle needs."""
    memory = physical_memory() or _MAX_MODEL
    limits = {}
    if manifest.reference is not None:
        limits[manifest.reference] = min(4 * manifest.param_count + _HEADERS, memory)
    for state in manifest.states:
        if isinstance(state.initial, str):
            limits[state.initial] = _tensor_size(state.past, dict.fromkeys(state.past.symbols, 1))
    # Those of the window and more, but not in all entries of a large batch.
    free = {symbol: _TIMES * size + _MORE for symbol, size in manifest.sizes.items()}
    # Hyena's filters have as many numbers of each order.
    options = ("hidden_size", "window_size", "num_layers", "order")
    made = math.prod(_count(manifest, name) for name in options)
    for graph in manifest.graphs.values():
        weights = min(4 * _COPIES * (manifest.param_count + made) + _HEADERS, memory)
        limits[graph.model] = min(weights, _MAX_MODEL)
        if graph.weights is not None:  # it may be the reference's too
            limits[graph.weights] = weights
        tested = [(folder, graph.inputs, graph.outputs) for folder in graph.test_data]
        if graph.test_sequence is not None:
            tested.append((graph.test_sequence.folder, graph.test_sequence.inputs, graph.test_sequence.outputs))
        for folder, inputs, outputs in tested:
            for kind, specs in (("input", inputs), ("output", outputs)):
                sizes = (min(_tensor_size(spec, free), memory) for spec in specs)
                limits |= {f"{folder}/{kind}_{index}.pb": size for index, size in enumerate(sizes)}
    return limits


def _count(manifest: Manifest, option: str) -> int:
    value: Any = manifest.program.options.get(option, 1)
    return value if type(value) is int else 1


def _tensor_size(spec: TensorSpec, free: Mapping[str, int]) -> int:
    """Bytes of a tensor of these free sizes; of a size that is an expression, as many as the largest power of them."""
    sizes = [size if isinstance(size, int) else size.at(free) or math.prod(free.values()) ** 2 for size in spec.shape]
    return 8 * math.prod(sizes) + _HEADER
