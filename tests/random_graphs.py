"""Random abstract graphs of what passes look for: dense layers, edifice ops, residuals, and the last frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from edifice_export.lowerings.domain import EDIFICE

__all__ = ["LONGEST", "RandomGraph", "random_graphs", "sizes", "width"]

LONGEST = 9
"""Frames of a window: more than the widest kernel has taps."""

Size = int | str


@dataclasses.dataclass
class RandomGraph:
    """A graph in the making.

    Attributes:
        draw: hypothesis's.
        sequences: values [batch, sequence, channels] to go on from.
    """

    draw: Callable[[st.SearchStrategy[Any]], Any]
    sequences: list[ir.Value] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.draw(st.integers(0, 999)))
        x = ir.Value(name="x", shape=ir.Shape(["batch", "sequence", 4]), type=ir.TensorType(ir.DataType.FLOAT))
        versions = {"": 20, EDIFICE.domain: EDIFICE.version}
        self.graph = ir.Graph([x], [], nodes=[], opset_imports=versions, name="random")
        self.sequences.append(x)
        self.module = "blocks.0"
        self.weights: list[tuple[ir.Value, ir.Value]] = []

    # Parts

    def pick(self, *, channels: int | None = None) -> ir.Value:
        """One of the latest sequences, or a projection to so many channels."""
        value: ir.Value = self.draw(st.sampled_from(self.sequences[-4:]))
        return value if channels in (None, width(value)) else self.dense(value, channels or 0)

    def constant(self, array: Any, dtype: type = np.float32) -> ir.Value:
        """A constant of a name of its own."""
        tensor = ir.tensor(np.asarray(array, dtype), name=f"{self.module}.constant{len(self.graph.initializers)}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def weight(self, *shape: int) -> ir.Value:
        """Random numbers that keep the size of what they are multiplied with."""
        return self.constant(self.random.standard_normal(shape) / max(1, shape[0]) ** 0.5)

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], *shapes: Sequence[Size], domain: str = "", **attributes: Any
    ) -> Any:
        """Adds a node with one output of each shape; gives its output, or the list of several."""
        name = f"{self.module}.layer{len(self.graph)}/{op.lower()}"
        node = ir.node(op, list(inputs), attributes, domain=domain, num_outputs=len(shapes), name=name)
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = name if len(shapes) == 1 else f"{name}.{index}"
            value.shape, value.type = ir.Shape(list(shape)), ir.TensorType(ir.DataType.FLOAT)
        if op in ("Greater", "Less"):
            node.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        self.graph.append(node)
        return node.outputs[0] if len(shapes) == 1 else list(node.outputs)

    def op(self, op: str, inputs: Sequence[ir.Value], *shapes: Sequence[Size], **attributes: Any) -> Any:
        """Adds a node of the edifice domain."""
        return self.node(op, inputs, *shapes, domain=EDIFICE.domain, **attributes)

    def same(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Adds an elementwise node of the first input's shape."""
        return self.node(op, inputs, sizes(inputs[0]), **attributes)

    def dense(self, x: ir.Value, channels: int) -> ir.Value:
        """x W + b, of a layer that may be one that there is already."""
        fitting = [pair for pair in self.weights if pair[0].shape == (width(x), channels)]
        if fitting and self.draw(st.booleans()):
            w, b = fitting[-1]
        else:
            w, b = self.weight(width(x), channels), self.weight(channels)
            self.weights.append((w, b))
        shape = [*sizes(x)[:-1], channels]
        return self.node("Add", [self.node("MatMul", [x, w], shape), b], shape)

    def calm(self, x: ir.Value) -> ir.Value:
        """Values from -1 to 1."""
        return self.same("Tanh", x)

    def axes(self, *axes: int) -> ir.Value:
        return self.constant(axes, np.int64)

    # Layers: each adds a sequence

    def layer(self, kind: str | None = None) -> None:
        """Adds a layer, of any kind if none is named."""
        kinds = [name for name in dir(self) if name.startswith("add_") and kind in (None, name.removeprefix("add_"))]
        added = getattr(self, self.draw(st.sampled_from(kinds)))()
        self.sequences += [each for each in added if tuple(sizes(each)[:2]) == ("batch", "sequence")]

    def add_dense(self) -> list[ir.Value]:
        return [self.dense(self.pick(), self.draw(st.sampled_from([1, 3, 4, 16])))]

    def add_split_dense(self) -> list[ir.Value]:
        parts = self.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
        product = self.dense(self.pick(), sum(parts))
        shapes = [["batch", "sequence", size] for size in parts]
        axis = self.draw(st.sampled_from([-1, 2]))
        return list(self.node("Split", [product, self.constant(parts, np.int64)], *shapes, axis=axis))

    def add_elementwise(self) -> list[ir.Value]:
        op = self.draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Gelu", "Neg", "Abs", "Softplus", "Silu", "Exp"]))
        x = self.pick()
        if op == "Silu":
            return [self.same("Mul", x, self.same("Sigmoid", x))]
        return [self.same(op, self.calm(x) if op == "Exp" else x)]

    def add_torch_softplus(self) -> list[ir.Value]:
        scale = self.draw(st.sampled_from([1.0, 30.0]))
        x = self.same("Mul", self.calm(self.pick()), self.constant(scale))
        large = self.same("Greater", x, self.constant(20.0))
        y = self.node("Where", [large, x, self.same("Softplus", x)], sizes(x))
        return [self.same("Mul", y, self.constant(1 / scale))]

    def add_wide_softplus(self) -> list[ir.Value]:
        scale = self.draw(st.sampled_from([1.0, 40.0]))
        x = self.same("Mul", self.calm(self.dense(self.pick(), 16)), self.constant(scale))
        return [self.same("Mul", self.same("Softplus", x), self.constant(1 / scale))]

    def add_steps(self) -> list[ir.Value]:
        """A softplus that is clipped, as steps of state-space models are."""
        x = self.dense(self.pick(), 16)
        low, high = self.draw(st.sampled_from([(0.001, 0.1), (0.1, 0.25), (0.0, 0.2), (0.1, 3.0)]))
        y = self.same("Softplus", self.same("Sub", x, self.constant(2.0)))
        return [self.node("Clip", [y, self.constant(low), self.constant(high)], sizes(y))]

    def add_binary(self) -> list[ir.Value]:
        x = self.pick()
        kind = self.draw(st.sampled_from(["residual", "constant", "computed", "one channel", "mean over time"]))
        y = {
            "residual": lambda: self.pick(channels=width(x)),
            "constant": lambda: self.weight(width(x)),
            "computed": lambda: self.computed(width(x)),
            "one channel": lambda: self.mean(self.pick(), 2),
            "mean over time": lambda: self.mean(self.pick(channels=width(x)), 1),
        }[kind]()
        swapped = [y, x] if self.draw(st.booleans()) else [x, y]
        return [self.calm(self.node(self.draw(st.sampled_from(["Add", "Mul", "Sub"])), swapped, sizes(x)))]

    def computed(self, channels: int) -> ir.Value:
        """What depends on constants alone: a number for each channel, of one axis or three."""
        rates = self.same("Exp", self.same("Neg", self.weight(channels)))
        if self.draw(st.booleans()):
            return rates
        return self.node("Expand", [rates, self.constant([1, 1, channels], np.int64)], [1, 1, channels])

    def mean(self, x: ir.Value, axis: int) -> ir.Value:
        """The mean over an axis, which stays."""
        shape = [1 if index == axis else size for index, size in enumerate(sizes(x))]
        return self.node("ReduceMean", [x, self.axes(self.draw(st.sampled_from([axis, axis - 3])))], shape, keepdims=1)

    def add_norm(self) -> list[ir.Value]:
        x = self.pick()
        scale, bias = self.weight(width(x)), self.weight(width(x))
        if self.draw(st.booleans()):
            return [self.node("LayerNormalization", [x, scale, bias], sizes(x), axis=-1, epsilon=0.1)]
        return [self.op("FlooredLayerNorm", [x, scale, bias], sizes(x), epsilon=0.01)]

    def add_softmax(self) -> list[ir.Value]:
        x = self.pick()
        return [self.node("Softmax", [x], sizes(x), axis=self.draw(st.sampled_from([-1, 2, 1])))]

    def add_concat(self) -> list[ir.Value]:
        x, y = self.pick(), self.pick()
        return [self.node("Concat", [x, y], ["batch", "sequence", width(x) + width(y)], axis=2)]

    def add_stack(self) -> list[ir.Value]:
        """Two sequences side by side on an axis of their own, and taken apart or summed."""
        x = self.pick()
        y = self.pick(channels=width(x))
        first: list[Size] = ["batch", "sequence", 1, width(x)]
        last: list[Size] = ["batch", "sequence", width(x)]
        each = [self.node("Unsqueeze", [value, self.axes(2)], first) for value in (x, y)]
        both = self.node("Concat", each, ["batch", "sequence", 2, width(x)], axis=-2)
        if self.draw(st.booleans()):
            return [self.node("ReduceSum", [both, self.axes(2)], last, keepdims=0)]
        bounds = [self.axes(1), self.axes(2), self.axes(2), self.axes(1)]
        return [self.node("Squeeze", [self.node("Slice", [both, *bounds], first), self.axes(2)], last)]

    def add_shift(self) -> list[ir.Value]:
        """Every frame but the first, and zeros at the end: the last frame is not that of the input."""
        x = self.pick()
        padded = self.node("Pad", [x, self.axes(0, 0, 0, 0, 1, 0)], ["batch", "sequence + 1", width(x)])
        bounds = [self.axes(1), self.axes(2**31), self.axes(1), self.axes(1)]
        return [self.node("Slice", [padded, *bounds], sizes(x))]

    def add_scores(self) -> list[ir.Value]:
        """Attention without a mask: a value with two axes of frames."""
        x, y = self.pick(channels=3), self.pick(channels=3)
        turned = self.node("Transpose", [y], ["batch", 3, "sequence"], perm=[0, 2, 1])
        scores = self.node("MatMul", [x, turned], ["batch", "sequence", "sequence"])
        return [self.node("MatMul", [self.same("Softmax", scores, axis=-1), y], sizes(x))]

    def add_conv(self) -> list[ir.Value]:
        x, kernel = self.pick(), self.draw(st.integers(1, 5))
        channels = width(x)
        inputs = [x, self.weight(channels, 1, kernel), self.weight(channels)]
        if self.draw(st.booleans()):
            inputs.append(self.weight(1, kernel - 1, channels))
        state = ["batch", kernel - 1, channels]
        y, after = self.op("CausalConv1d", inputs, sizes(x), state, groups=channels)
        return [self.with_state(y, after, 1)]

    def with_state(self, y: ir.Value, state: ir.Value, *axes: int) -> ir.Value:
        """What an op gives, sometimes with what it leaves after the last frame, summed over axes, or that alone."""
        kind = self.draw(st.sampled_from(["output", "output", "both", "state"]))
        if kind == "output":
            return y
        kept = [1 if axis in axes else size for axis, size in enumerate(sizes(state))]
        total = self.node("ReduceSum", [state, self.axes(*axes)], kept, keepdims=1) if axes else state
        total = self.calm(total)
        if len(kept) > 3:
            total = self.node("Squeeze", [total, self.axes(1)], [kept[0], *kept[2:]])
        if len(kept) < 3:
            total = self.node("Unsqueeze", [total, self.axes(1)], [kept[0], 1, kept[1]])
        return self.node("Add", [y if kind == "both" else self.pick(channels=width(y)), total], sizes(y))

    def add_attention(self) -> list[ir.Value]:
        query, key, value = (self.pick(channels=4) for _ in range(3))
        if self.draw(st.booleans()):
            prefixed: list[Size] = ["batch", "sequence + 2", 4]
            key, value = (self.node("Pad", [each, self.axes(0, 2, 0, 0, 0, 0)], prefixed) for each in (key, value))
        return [self.op("CausalAttention", [query, key, value], sizes(query), num_heads=2, epsilon=0.0)]

    def add_linear_scan(self) -> list[ir.Value]:
        x = self.pick()
        step = self.dense(self.pick(), self.draw(st.sampled_from([1, width(x)])))
        decay = self.same("Neg", self.same("Softplus", step))
        inputs = [x, decay, *([self.weight(1, width(x))] if self.draw(st.booleans()) else [])]
        y, state = self.op("LinearScan", inputs, sizes(x), ["batch", width(x)])
        return [self.calm(self.with_state(y, state))]

    def add_selective_scan(self) -> list[ir.Value]:
        x, b, c = self.pick(), self.pick(channels=3), self.pick(channels=3)
        delta = self.same("Softplus", self.dense(self.pick(), width(x)))
        rates = self.constant(-np.exp(self.random.standard_normal((width(x), 3))))
        inputs = [x, delta, rates, b, c, *([self.weight(1, 3, width(x))] if self.draw(st.booleans()) else [])]
        y, state = self.op("SelectiveScan", inputs, sizes(x), ["batch", 3, width(x)])
        return [self.calm(self.with_state(y, state, 1))]

    def add_diagonal_scan(self) -> list[ir.Value]:
        x, exact = self.pick(), self.draw(st.booleans())
        b, c = (
            self.node("Unsqueeze", [self.pick(channels=3), self.axes(2)], ["batch", "sequence", 1, 3]) for _ in "bc"
        )
        decay = self.constant(-0.1 * np.exp(self.random.standard_normal((1, 3))))
        shape: list[Size] = ["batch", "sequence", 1, width(x)]
        if exact:
            given = [self.weight(1, 1, 3, width(x))] if self.draw(st.booleans()) else []
            y, state = self.op("DiagonalScan", [x, decay, b, c, *given], shape, ["batch", 1, 3, width(x)])
        else:
            y = self.op("CumulativeScan", [x, decay, b, c], shape, epsilon=1e-10)
        y = self.calm(self.node("Squeeze", [y, self.axes(2)], sizes(x)))
        return [self.with_state(y, state, 1, 2) if exact else y]

    def add_fft_conv(self) -> list[ir.Value]:
        x = self.pick()
        return [self.calm(self.op("FftConv", [x, self.weight(LONGEST, width(x))], sizes(x)))]

    # Ends

    def finish(self) -> ir.Model:
        """Reads the last frame of some sequences, and sometimes gives others whole."""
        self.module = "head"
        last = self.sequences[-1]
        frame = self.node("Gather", [last, self.constant(-1, np.int64)], ["batch", width(last)], axis=1)
        outputs = [self.head(frame)]
        if self.draw(st.booleans()):
            other = self.pick()
            outputs.append(self.node("Gather", [other, self.constant(-1, np.int64)], ["batch", width(other)], axis=1))
        if self.draw(st.integers(0, 3)) == 0:
            outputs.append(self.same("Identity", self.pick()))
        if self.draw(st.integers(0, 3)) == 0 and self.sequences[-1].producer() is not None:
            outputs.append(self.sequences[-1])
        outputs.append(self.streamed())
        self.graph.outputs.extend(dict.fromkeys(outputs))
        _drop_unread(self.graph)
        return ir.Model(self.graph, ir_version=10)

    def streamed(self) -> ir.Value:
        """x through an op, of all frames: ops tell which sizes are frames."""
        x = self.sequences[0]
        y, _ = self.op("CausalConv1d", [x, self.weight(4, 1, 2), self.weight(4)], sizes(x), ["batch", 1, 4], groups=4)
        return y

    def head(self, frame: ir.Value) -> ir.Value:
        """Dense layers of one frame, some of which read the same."""
        given, found = width(frame), []
        for _ in range(self.draw(st.integers(1, 3))):
            inputs = [frame, self.weight(3, given), *([self.weight(3)] if self.draw(st.booleans()) else [])]
            y = self.node("Gemm", inputs, ["batch", 3], transB=1)
            if self.draw(st.booleans()):
                parts = self.node("Split", [y, self.constant([1, 2], np.int64)], ["batch", 1], ["batch", 2], axis=-1)
                y = self.node("Concat", parts, ["batch", 3], axis=1)
            found.append(y)
        return self.node("Concat", found, ["batch", 3 * len(found)], axis=-1)


def sizes(value: ir.Value) -> list[Size]:
    """The shape of a value, symbols as text."""
    return [size if isinstance(size, int) else str(size) for size in value.shape or ()]


def width(value: ir.Value) -> int:
    """The number of channels."""
    return int(sizes(value)[-1])


def _drop_unread(graph: ir.Graph) -> None:
    """Takes away what no output depends on, as tracing does."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


@st.composite
def random_graphs(draw: Any, kind: str | None = None) -> ir.Model:
    """Graphs of up to eight layers, from x to the last frame; or of up to three of one kind."""
    made = RandomGraph(draw)
    for _ in range(draw(st.integers(1, 3 if kind else 8))):
        made.layer(kind)
    return made.finish()
