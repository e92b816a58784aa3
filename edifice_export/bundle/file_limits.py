"""What the files of a bundle are for, and so how large each can be: known before any is read."""

from __future__ import annotations

import math
from typing import Any

from ..machine import physical_memory
from ..specification import BATCH, SEQUENCE, TensorSpec
from .manifest import Manifest

__all__ = ["file_limits"]

_MAX_MODEL = 2**31
"""Bytes: protobuf's own limit."""

_HEADER, _HEADERS = 2**12, 2**24
"""Bytes beside the numbers of a tensor, and of all weights of 512 blocks: names, shapes, nodes."""

_COPIES = 4
"""Of each weight, and of each number that is made of weights, in a graph; ours hold one, and two in places."""

_MAX_BATCH, _WINDOWS = 8, 4
"""Of test data; ours are of batch 2, and 2.5 windows long."""


def file_limits(manifest: Manifest) -> dict[str, int]:
    """The most bytes of each file that a bundle needs, and of those that its models may keep weights in."""
    memory = physical_memory() or _MAX_MODEL
    limits = {manifest.reference: min(4 * manifest.param_count + _HEADERS, memory)}
    for state in manifest.states:
        if isinstance(state.initial, str):
            limits[state.initial] = _tensor_size(state.past, 1, 1)
    frames = _WINDOWS * (manifest.window_size + 2)
    for graph in manifest.graphs.values():
        # Hyena's filters have as many numbers of each order.
        made = graph.outputs[0].shape[-1] * math.prod(
            _count(manifest, n) for n in ("window_size", "num_layers", "order")
        )
        weights = min(4 * _COPIES * (manifest.param_count + int(made)) + _HEADERS, memory)
        limits |= {graph.model: min(weights, _MAX_MODEL), f"{graph.model}.data": weights}
        tested = [(folder, graph.inputs, graph.outputs) for folder in graph.test_data]
        if graph.test_sequence is not None:
            tested.append((graph.test_sequence.folder, graph.test_sequence.inputs, graph.test_sequence.outputs))
        for folder, inputs, outputs in tested:
            for kind, specs in (("input", inputs), ("output", outputs)):
                sizes = (_tensor_size(spec, _MAX_BATCH, frames) for spec in specs)
                limits |= {f"{folder}/{kind}_{index}.pb": size for index, size in enumerate(sizes)}
    return limits


def _count(manifest: Manifest, option: str) -> int:
    value: Any = manifest.options.get(option, 1)
    return value if type(value) is int else 1


def _tensor_size(spec: TensorSpec, batch: int, frames: int) -> int:
    """Bytes of a tensor; one with both free sizes has so many frames of all entries together."""
    free = {BATCH: 1 if SEQUENCE in spec.shape else batch, SEQUENCE: frames}
    return 8 * math.prod(free.get(size, 1) if isinstance(size, str) else size for size in spec.shape) + _HEADER
