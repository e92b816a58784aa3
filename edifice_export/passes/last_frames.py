"""Only the last frame's output is asked for: whatever is needed of it alone is computed for the last frames alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from edifice_reference.ops.op import DeclaredOp

from ..lowerings.registry import op_of_node
from ..specification import Size, last_of
from .editing import array_of, axis_of, given, initializer, is_constant, new_value, remove

__all__ = ["last_frames"]

ALL = math.inf
"""Every frame is needed."""

_ELEMENTWISE = """Abs Add And Cast Clip Div Elu Equal Erf Exp Gelu Greater GreaterOrEqual HardSigmoid HardSwish Less
LeakyRelu LessOrEqual Log Max Min Mish Mul Neg Not Or Pow Reciprocal Relu Selu Sigmoid Sign Softplus Sqrt Sub Tanh
Where"""
_ALONG_OTHER_AXES = frozenset({"Concat", "LayerNormalization", "LogSoftmax", "Softmax", "Split"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"})
_WITH_AXES = frozenset({"Squeeze", "Unsqueeze"})


def last_frames(model: ir.Model) -> int:
    """Has every node compute no more of the last frames than its readers need.

    From what reads one frame, the last (`Gather` at -1), the numbers of frames needed go up through the graph: the
    final layer's feed-forward, gates, output projections, queries and read-outs are needed for one frame, what goes
    into a short convolution for as many as its kernel is long, what goes into recurrences, keys and values for all.
    Then, from the inputs down, a Slice is put where fewer frames are needed than there are. A sequence that is shorter
    is taken whole.

    Returns:
        How many nodes compute fewer frames than before.
    """
    return _Narrowing(model.graph).run()


class _Narrowing:
    """One run of the pass over a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.frames = _Frames(graph)
        self.needed: dict[ir.Value, float] = {}  # frames that some reader needs
        self.counts: dict[
            ir.Node, list[float] | None
        ] = {}  # what each node needs, by the shapes before any is narrowed
        self.held: dict[ir.Value, float] = {}  # frames that there are, of values that are no longer whole
        self.sliced: dict[tuple[ir.Value, float], ir.Value] = {}

    def run(self) -> int:
        nodes = list(self.graph)
        for value in self.graph.outputs:
            self.needed[value] = ALL
        for node in reversed(nodes):
            self.counts[node] = _counts(self.frames, node, self._of(node))
            for value, count in self._needs(node):
                self.needed[value] = max(self.needed.get(value, 0), count)
        narrowed = 0
        for node in nodes:
            of_one = self.needed.get(node.outputs[0]) == 1
            if (of_one and _compute_the_last(self.graph, node)) or self._narrow(node):
                narrowed += 1
        return narrowed

    def _of(self, node: ir.Node) -> float:
        """Frames that are needed of what a node gives for every frame: its first output, or any part of a split.

        Of a node from which only a state is read, one: there are no sequences of none.
        """
        outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
        return max(1, *(self.needed.get(value, 0) for value in outputs))

    def _needs(self, node: ir.Node) -> Iterable[tuple[ir.Value, float]]:
        """What a node needs of each input."""
        counts = self.counts[node]
        for index, value in enumerate(node.inputs):
            if value is not None:
                yield value, counts[index] if counts is not None else ALL

    def _narrow(self, node: ir.Node) -> bool:
        """Gives a node no more frames than it needs."""
        if _selects_the_last(self.frames, node):
            return False
        of, counts = self._of(node), self.counts[node]
        if counts is None:
            return False
        for index, value in enumerate(node.inputs):
            if value is not None and counts[index] < self.held.get(value, ALL) and self.frames.axis(value) is not None:
                node.replace_input_with(index, self._slice(node, value, counts[index]))
        if of == ALL:
            return False
        held = _held(node, of, counts)
        for value in node.outputs if node.op_type == "Split" else node.outputs[:1]:
            axis = self.frames.axis(value)
            if axis is not None and value.shape is not None:
                self.held[value] = held
                size = self.frames.last(value.shape[axis], held)
                value.shape = ir.Shape([*value.shape[:axis], size, *value.shape[axis + 1 :]])
        return True

    def _slice(self, node: ir.Node, value: ir.Value, count: float) -> ir.Value:
        """The last frames of a value, before the node that first needs them."""
        if (value, count) not in self.sliced:
            axis = cast(int, self.frames.axis(value))
            name = f"{value.name}/last_{count:.0f}"
            bounds = [
                initializer(self.graph, f"{what}_{number:.0f}", np.array([number], np.int64))
                for what, number in (("start", -count), ("end", _END), ("axis", axis))
            ]
            slicing = ir.node("Slice", [value, *bounds], name=name)
            shape = value.shape
            assert shape is not None
            size = self.frames.last(shape[axis], count)
            new_value(slicing.outputs[0], value, name, [*shape[:axis], size, *shape[axis + 1 :]])
            self.graph.insert_before(node, slicing)
            self.sliced[value, count] = slicing.outputs[0]
        return self.sliced[value, count]


_END = 2**63 - 1


class _Frames:
    """Which sizes are frames: those of the streamed inputs of ops, and the last of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._symbols: set[str] = set()
        for node in graph:
            op = op_of_node(node)
            streamed = op.declared.streamed if op is not None else ()
            for name, value in zip(op.declared.inputs if op is not None else (), node.inputs, strict=False):
                if name in streamed and value is not None and value.shape is not None and len(value.shape) > 1:
                    self._symbols.update(_symbols(value.shape[1]))

    def axis(self, value: ir.Value | None) -> int | None:
        """The axis of frames, whole or narrowed."""
        if value is None or value.shape is None:
            return None
        found = [axis for axis, size in enumerate(value.shape) if self._symbols.intersection(_symbols(size))]
        return found[0] if len(found) == 1 else None

    def last(self, size: int | ir.SymbolicDim, count: float) -> int | ir.SymbolicDim:
        """Of the last frames: as many as there are, at most `count`; one there always is."""
        if count == 1:
            return 1
        (symbol,) = _symbols(size)
        return ir.SymbolicDim(str(last_of(symbol, int(count))))


def _symbols(size: int | ir.SymbolicDim) -> tuple[str, ...]:
    """The one symbol of a size that is it, or some of its last; none of others."""
    if not isinstance(size, ir.SymbolicDim) or size.value is None:
        return ()
    parsed = Size.parse(size.value)
    return parsed.symbols if parsed.symbol is not None or parsed.last is not None else ()


def _selects_the_last(frames: _Frames, node: ir.Node) -> bool:
    """Whether a node takes the last frame away from a sequence."""
    if node.op_type != "Gather" or node.domain or not is_constant(node.inputs[1]):
        return False
    value = given(node, 0)
    axis = frames.axis(value)
    index = array_of(node.inputs[1])
    return axis is not None and axis == axis_of(node, len(value.shape or ())) and index.shape == () and index == -1


def _counts(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    """Frames that a node needs of each input to give the last `of`, or None where it needs all of them to give any."""
    if _selects_the_last(frames, node):
        return [1, ALL]
    op = op_of_node(node)
    if op is not None:
        return _of_op(op.declared, node, of)
    rule = _RULES.get(node.op_type) if not node.domain else None
    return rule(frames, node, of) if rule is not None else None


def _elementwise(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    axis = _from_the_right(frames, node.outputs[0])
    aligned = all(_from_the_right(frames, value) in (None, axis) for value in node.inputs if value is not None)
    return [of] * len(node.inputs) if axis is not None and aligned else None


def _from_the_right(frames: _Frames, value: ir.Value | None) -> int | None:
    axis = frames.axis(value)
    return None if axis is None else axis - len(cast(ir.Value, value).shape or ())


def _along_another_axis(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    value = given(node, 0)
    axis = frames.axis(value)
    default = -1 if node.op_type != "Split" else 0
    own = axis_of(node, len(value.shape or ()), default) if value.shape else None
    # Layer norm takes the axes from its own to the last.
    if axis is None or own is None or (own <= axis if node.op_type == "LayerNormalization" else own == axis):
        return None
    counts = [of if frames.axis(each) == axis else ALL for each in node.inputs]
    return counts if node.op_type != "Concat" or ALL not in counts else None


def _reduction(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    axis, axes = frames.axis(given(node, 0)), node.inputs[1] if len(node.inputs) > 1 else None
    if axis is None or not is_constant(axes):
        return None
    rank = len(given(node, 0).shape or ())
    return [of, ALL] if axis not in {int(each) % rank for each in array_of(axes).flat} else None


def _moved_axis(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    """Squeeze and Unsqueeze of other axes."""
    whole = frames.axis(given(node, 0)) is not None and frames.axis(node.outputs[0]) is not None
    return [of, ALL] if whole and is_constant(node.inputs[1]) else None


def _sliced(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    """A slice of other axes."""
    axis, axes = frames.axis(given(node, 0)), node.inputs[3] if len(node.inputs) > 3 else None
    if axis is None or not is_constant(axes):
        return None
    rank = len(given(node, 0).shape or ())
    return [of, *[ALL] * (len(node.inputs) - 1)] if axis not in {int(each) % rank for each in array_of(axes)} else None


def _product(frames: _Frames, node: ir.Node, of: float) -> list[float] | None:
    left, right = given(node, 0), given(node, 1)
    axis = frames.axis(left)
    rows = axis is not None and left.shape is not None and axis < len(left.shape) - 1
    return [of, ALL] if rows and is_constant(right) else None


def _of_op(op: DeclaredOp[..., Any], node: ir.Node, of: float) -> list[float] | None:
    """By what is declared: fewer read-outs, or as many frames as decide those that are needed and the state."""
    if op.read_out is not None and not (op.reads_one_or_all and of > 1):
        fewer, count = {op.read_out}, of
    elif op.sees is not None:
        sees = op.sees if isinstance(op.sees, int) else _size_of(node, op, *op.sees)
        fewer, count = set(op.streamed), of + sees - 1
    else:
        return None
    return [count if name in fewer else ALL for name, _ in zip(op.inputs, node.inputs, strict=False)]


def _size_of(node: ir.Node, op: DeclaredOp[..., Any], name: str, axis: int) -> float:
    """The size of an input, ALL where it is free."""
    shape = given(node, op.inputs.index(name)).shape
    size = shape[axis] if shape is not None else None
    return size if isinstance(size, int) else ALL


def _held(node: ir.Node, of: float, counts: Sequence[float]) -> float:
    """Frames that a node gives: an op as many as there are read-outs, or else of what is streamed."""
    op = op_of_node(node)
    if op is None:
        return of
    return counts[op.declared.inputs.index(op.declared.read_out or op.declared.streamed[0])]


_RULES: dict[str, Callable[[_Frames, ir.Node, float], list[float] | None]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_ALONG_OTHER_AXES, _along_another_axis),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_WITH_AXES, _moved_axis),
    "MatMul": _product,
    "Slice": _sliced,
}
"""Of standard operators."""


def _compute_the_last(graph: ir.Graph, node: ir.Node) -> bool:
    """Puts in place of an op, whose output is needed at one frame, what gives just that one; False if nothing does."""
    found = _last(graph, node)
    if found is None:
        return False
    y = node.outputs[0]
    assert y.shape is not None
    name = cast(str, y.name)
    y.name = f"{name}.whole"
    new_value(found, y, name, [y.shape[0], 1, *y.shape[2:]])
    y.replace_all_uses_with(found)
    if not any(value.uses() or value.is_graph_output() for value in node.outputs):
        remove(graph, [node])
    return True


def _last(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The first output of an op at the last frame alone: the state after it, or what the op has for that."""
    op = op_of_node(node)
    if op is None:
        return None
    nodes: Sequence[ir.Node] = []
    if op.declared.ends_with_state:
        axis = initializer(graph, "axis_1", np.array([1], np.int64))
        nodes = [ir.node("Unsqueeze", [node.outputs[1], axis], name=f"{node.name}/last")]
    elif op.last is not None:
        nodes = op.last(node)
    for each in nodes:
        for index, value in enumerate(each.inputs):
            if value is not None and value.const_value is not None and not value.is_initializer():
                each.replace_input_with(index, initializer(graph, cast(str, value.name), array_of(value)))
    graph.insert_after(node, nodes)
    return nodes[-1].outputs[0] if nodes else None
