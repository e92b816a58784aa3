"""Weight file: what the graphs of a bundle share of their weights, each number once, in one safetensors file.

Graphs point into it, as ONNX's external data may: by an offset and a length. A constant of a graph is, where that can
be, the bytes of parameters of the program: one, some rows of one, or several one after the other, which then lie so in
the file. The transpose of such bytes is left to the runtime, which makes it when it loads a graph and never after that.
What no parameter holds, such as values that were folded, is a tensor of its own, `graph/<name>`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from ..weights.formats.safetensors import write_safetensors
from ..weights.sources import OF_GRAPHS

__all__ = ["SHARED_FROM", "WeightFile"]

SHARED_FROM = 2**20
"""Bytes of weights from which on graphs share a file; below that a file for each graph is the simpler thing."""

_SMALL = 512
"""Bytes up to which constants stay in the graphs, which are larger without them: shapes, scalars."""

_KEY = 64
"""Bytes by which places where a constant may lie are looked up."""

_Key = tuple[np.dtype, bytes]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where bytes lie: from `start` on in the first of several tensors that follow each other in the file."""

    tensors: tuple[str, ...]
    start: int
    size: int


class WeightFile:
    """The weights of several graphs: first each graph is stripped, then the file is written, then each points into it.

    Args:
        parameters: of the program, by name; no copies are made.
        whole: whether all of them go into the file, which is the reference then, or what graphs use of them.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray], whole: bool) -> None:
        self._tensors: dict[str, np.ndarray] = {}
        self._used: set[str] = set(parameters) if whole else set()
        self._begins: dict[_Key, list[str]] = defaultdict(list)
        self._rows: dict[_Key, tuple[str, int]] = {}
        self._next: dict[str, str] = {}
        self._previous: dict[str, str] = {}
        self._constants: dict[str, dict[str, _Place]] = defaultdict(dict)
        self._offsets: dict[str, int] = {}
        for name, array in parameters.items():
            self._add(name if whole else OF_GRAPHS + name, array)

    def strip(self, model: onnx.ModelProto) -> None:
        """Takes the numbers of large constants out of a graph, and leaves it their names, types and shapes."""
        products = _products(model.graph)
        places = self._constants[model.graph.name]
        for tensor in list(model.graph.initializer):
            array = onnx.numpy_helper.to_array(tensor)
            if array.nbytes <= _SMALL or array.dtype.name not in _TYPES:
                continue
            place = self._find(array)
            if place is None and tensor.name in products and array.ndim == 2:
                turned = np.ascontiguousarray(array.T)
                place = self._find(turned)
                if place is not None:
                    _turn(model.graph, tensor)
            places[tensor.name] = place or self._keep(tensor.name, array)
            self._used.update(places[tensor.name].tensors)
            tensor.ClearField("raw_data")

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the file, when all graphs were stripped."""
        ordered = {name: self._tensors[name] for name in self._order()}
        self._offsets = write_safetensors(path, ordered, metadata)

    def point(self, model: onnx.ModelProto, file: str) -> None:
        """Has a graph that was stripped read its constants from the file that was written."""
        for tensor in model.graph.initializer:
            place = self._constants[model.graph.name].get(tensor.name)
            if place is not None:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                offset = self._offsets[place.tensors[0]] + place.start
                for key, value in (("location", file), ("offset", offset), ("length", place.size)):
                    tensor.external_data.add(key=key, value=str(value))

    def _add(self, name: str, array: np.ndarray) -> None:
        """Takes a tensor into the file, and into the index by its beginning and those of its rows."""
        self._tensors[name] = array = np.ascontiguousarray(array)
        data = _bytes(array)
        if len(data) <= _SMALL:
            return
        begins = self._begins[_key(array.dtype, data, 0)]
        if not any(np.array_equal(_bytes(self._tensors[other]), data) for other in begins):
            begins.append(name)
            begins.sort(key=lambda other: -self._tensors[other].nbytes)
        row = array.nbytes // len(array)
        if row >= _KEY:
            for start in range(0, len(data), row):
                self._rows.setdefault(_key(array.dtype, data, start), (name, start))

    def _keep(self, name: str, array: np.ndarray) -> _Place:
        """A tensor of its own for what nothing else holds."""
        wanted = unused = OF_GRAPHS + name
        number = 0
        while unused in self._tensors:
            number += 1
            unused = f"{wanted}_{number}"
        self._add(unused, array.copy())
        return _Place((unused,), 0, array.nbytes)

    def _find(self, array: np.ndarray) -> _Place | None:
        """Where the bytes of an array lie, or can lie."""
        data = _bytes(array)
        names = tuple(self._cover(array.dtype, data))
        if sum(self._tensors[name].nbytes for name in names) == len(data) and self._join(names):
            return _Place(names, 0, len(data))
        name, start = self._rows.get(_key(array.dtype, data, 0), ("", 0))
        if name and np.array_equal(_bytes(self._tensors[name])[start : start + len(data)], data):
            return _Place((name,), start, len(data))
        return None

    def _cover(self, dtype: np.dtype, data: np.ndarray) -> Iterator[str]:
        """Whole tensors that these bytes are, one after the other, as far as there are any."""
        start = 0
        while start < len(data):
            for name in self._begins.get(_key(dtype, data, start), ()):
                held = _bytes(self._tensors[name])
                if np.array_equal(held, data[start : start + len(held)]):
                    break
            else:
                return
            yield name
            start += len(held)

    def _join(self, names: tuple[str, ...]) -> bool:
        """Has tensors follow each other in the file, if nothing that was found before asks for something else."""
        pairs = list(itertools.pairwise(names))
        if len(set(names)) < len(names):
            return False
        if any(self._next.get(one, two) != two or self._previous.get(two, one) != one for one, two in pairs):
            return False
        if not set(names[:-1]).isdisjoint(self._after(names[-1])):
            return False
        self._next.update(pairs)
        self._previous.update((two, one) for one, two in pairs)
        return True

    def _after(self, name: str) -> Iterator[str]:
        """A tensor, and those that have to follow it."""
        yield name
        while name in self._next:
            name = self._next[name]
            yield name

    def _order(self) -> Iterator[str]:
        """The tensors in the file's order: wider types first, so that each lies at a multiple of its own size."""
        kept = self._used.union(*(self._after(name) for name in self._used))
        firsts = [name for name in self._tensors if name in kept and name not in self._previous]
        for name in sorted(firsts, key=lambda name: -self._tensors[name].dtype.itemsize):
            yield from self._after(name)


_TYPES = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}
"""What safetensors and ONNX both have; of others, constants stay in the graphs."""


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _key(dtype: np.dtype, data: np.ndarray, start: int) -> _Key:
    return dtype, data[start : start + _KEY].tobytes()


def _products(graph: onnx.GraphProto) -> set[str]:
    """What is nothing else than the second factor of products."""
    found = {node.input[1] for node in graph.node if node.op_type == "MatMul" and not node.domain}
    others = (name for node in graph.node for name in _others(node))
    return found.difference(others, (output.name for output in graph.output))


def _others(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, graphs inside it included, but for the second factor of a product."""
    yield from node.input[:1] if node.op_type == "MatMul" and not node.domain else node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inner.input


def _turn(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    """Makes of a constant the transpose of one, which takes its place and another name."""
    taken = {each.name for each in graph.initializer}
    name = tensor.name
    while name in taken:
        name += ".stored"
    graph.node.insert(0, onnx.helper.make_node("Transpose", [name], [tensor.name], tensor.name, perm=[1, 0]))
    dims = list(reversed(tensor.dims))
    tensor.name = name
    del tensor.dims[:]
    tensor.dims.extend(dims)
