"""What a graph costs, worked out node by node from the sizes of its inputs: nothing of the model runs.

- A matrix product takes 2 * M * N * K operations, a convolution 2 * output elements * channels per group * kernel size,
  data movement none, a reduction one per element read, any other operator one per element of its first output.
- A node reads each input whole and writes each output whole, once; weights are inputs. A view moves nothing.
- The body of a Scan counts once per step, at that step's sizes where they follow from what it scans; of an If whose
  condition follows from the sizes the branch that is taken. Each body of a Loop or of another If counts once, and
  these are named in `unknown`, as is what is left out: ONNX can't tell its shapes, or the rules would be far off
  (Einsum, pooling, recurrent layers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import ChainMap
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, reference, shape_inference
from onnx.helper import tensor_dtype_to_np_dtype as dtype_of

from ..bundle.nesting import find, qualified
from ..errors import CheckError

__all__ = ["AWAY", "MAX_ELEMENTS", "MAX_FOLDED", "Activation", "Walk", "byte_size", "dtype_of"]

MAX_ELEMENTS = 2**50  # of one tensor: ONNX's shape inference multiplies dimensions without a check for overflow
MAX_FOLDED = 2048  # bytes of a tensor whose data is kept: shapes, axes and pads are far smaller
_MAX_STEPS = 20_000  # of Scans that are walked step by step, those inside others multiplied
AWAY = TensorProto.EXTERNAL  # the data_location of a tensor of which only the type and shape are known

_VIEWS = "Constant Flatten Identity Reshape Shape Size Squeeze Unsqueeze"
_MOVEMENT = f"""{_VIEWS} BitCast Cast CastLike CenterCropPad Compress Concat ConstantOfShape DepthToSpace Dropout Expand
EyeLike Gather GatherElements GatherND NonZero OneHot Pad Range ReverseSequence Scatter ScatterElements ScatterND Slice
SpaceToDepth Split TensorScatter Tile Transpose Trilu Where"""
# What exporters compute shapes with. Each takes time bounded by the sizes of its inputs and outputs.
_SHAPE_ARITHMETIC = f"""{_VIEWS} Abs Add And Cast CastLike Ceil Concat ConstantOfShape Div Equal Expand Floor Gather
Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Not Or Range ReduceMax ReduceMin ReduceProd ReduceSum Round
Slice Split Sqrt Sub Transpose Where"""
_NO_RULE = """Attention AveragePool CausalConvWithState ConvTranspose DFT DeformConv Det Einsum GRU If LSTM
LinearAttention Loop LpPool MaxPool NegativeLogLikelihoodLoss QLinearConv RNN RoiAlign STFT SoftmaxCrossEntropyLoss"""
_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}  # packed in ONNX, a byte each in numpy


@dataclasses.dataclass(frozen=True)
class Activation:
    """A tensor that depends on the input, under its name in the inlined graph."""

    name: str
    shape: list[int]
    bytes: int


def byte_size(tensor: TensorProto) -> int:
    if min(tensor.dims, default=0) < 0 or math.prod(filter(None, tensor.dims)) > MAX_ELEMENTS:
        raise CheckError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}; give smaller sizes or another model")
    elements, dtype = int(math.prod(tensor.dims)), dtype_of(tensor.data_type)
    return -(-elements * _BITS.get(dtype.name, 8 * dtype.itemsize) // 8)


class Walk:
    """One pass over an inlined graph, which works out each tensor and counts each node."""

    def __init__(self, opsets: dict[str, int]) -> None:
        self.opsets = opsets
        self.flops = self.bytes_moved = self.steps = 0
        self.largest: Activation | None = None
        self.live: set[str] = set()  # tensors that depend on an input
        self.unknown: set[str] = set()

    def graph(
        self, graph: onnx.GraphProto, outer: ChainMap[str, TensorProto], live: bool, times: int
    ) -> ChainMap[str, TensorProto]:
        """Walks a graph whose inputs have types, and returns its tensors. A body sees the tensors around it and runs
        several times."""
        scope = outer.new_child({weight.name: weight for weight in graph.initializer})
        self.define([value for value in graph.input if value.name not in scope], scope, live)
        for node in graph.node:
            names = {name for inner in (node, *find(node, onnx.NodeProto)) for name in inner.input}
            alone = self.infer(node, [scope[name] for name in names if name in scope])
            depends = not self.live.isdisjoint(names)
            taken = _branch_taken(node, scope)
            if taken is not None:
                inner = self.graph(taken, scope, depends, times)
                self.pass_on(taken, node, inner, scope)
                continue
            self.define(alone.output, scope, depends)
            self.fold(alone, scope)
            if node.op_type == "Scan" and not node.domain and "" not in node.input:
                self.scan(alone.node[0], scope, depends, times)
            else:
                for attribute in alone.node[0].attribute:
                    self.graph(attribute.g, scope, depends, times)  # an empty graph, if it is another attribute
            if depends or node.op_type != "Transpose":  # of a constant, it is made once, when a runtime loads the graph
                self.count(node, scope, times)
        return scope

    def scan(self, node: onnx.NodeProto, scope: ChainMap[str, TensorProto], live: bool, times: int) -> None:
        """Walks the body of a Scan; step by step if some of what it scans is known, on which its sizes may depend."""
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        body, count = given["body"], given["num_scan_inputs"]
        axes = given.get("scan_input_axes", [0] * count)
        scanned = list(zip(body.input[-count:], node.input[-count:], axes, strict=True))
        known = {
            inner.name: (numpy_helper.to_array(scope[outer]), axis)
            for inner, outer, axis in scanned
            if outer in scope and scope[outer].data_location != AWAY
        }
        _, last, axis = scanned[-1]
        steps = scope[last].dims[axis] if last in scope else 1
        if not known:
            results = self.graph(body, scope, live, times * steps)
        for step in range(steps if known else 0):
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise CheckError(
                    f"Scans take more than {_MAX_STEPS} steps to walk; give smaller sizes or another model"
                )
            at = {name: numpy_helper.from_array(array.take(step, axis), name) for name, (array, axis) in known.items()}
            results = self.graph(body, scope.new_child(at), live, times)
        written = given.get("scan_output_axes", [0] * len(node.output))
        states = len(node.input) - count
        for index, (value, name) in enumerate(zip(body.output, node.output, strict=True)):
            if not steps or name in scope or value.name not in results:
                continue
            dims = list(results[value.name].dims)
            if index >= states:
                dims.insert(written[index - states] % (len(dims) + 1), steps)
            kind = helper.make_tensor_value_info(name, results[value.name].data_type, dims)
            self.define([kind], scope, live)

    def pass_on(
        self,
        taken: onnx.GraphProto,
        node: onnx.NodeProto,
        inner: Mapping[str, TensorProto],
        scope: ChainMap[str, TensorProto],
    ) -> None:
        """Gives the outputs of an If what the branch that is taken gives."""
        for value, name in zip(taken.output, node.output, strict=True):
            if value.name in inner:
                scope[name] = TensorProto()
                scope[name].CopyFrom(inner[value.name])
                scope[name].name = name
                (self.live.add if value.name in self.live else self.live.discard)(name)

    def infer(self, node: onnx.NodeProto, known: list[TensorProto]) -> onnx.GraphProto:
        """A graph of the node alone, with all that ONNX can tell of its outputs and of the inputs of its bodies."""
        inputs = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in known]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        data = [tensor for tensor in known if tensor.data_location != AWAY]
        graph = helper.make_graph([node], "alone", inputs, outputs, data)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in self.opsets.items()])
        return shape_inference.infer_shapes(model, data_prop=True).graph

    def define(self, values: Iterable[onnx.ValueInfoProto], scope: ChainMap[str, TensorProto], live: bool) -> None:
        """Adds those tensors to the scope that hold numbers and have a known shape."""
        for name, kind in ((value.name, value.type.tensor_type) for value in values):
            dims = [dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value")]
            if kind.HasField("shape") and len(dims) == len(kind.shape.dim) and kind.elem_type != TensorProto.STRING:
                scope[name] = TensorProto(name=name, data_type=kind.elem_type, dims=dims, data_location=AWAY)
                (self.live.add if live else self.live.discard)(name)
                size = byte_size(scope[name])
                if live and (self.largest is None or size > self.largest.bytes):
                    self.largest = Activation(name, dims, size)

    def fold(self, alone: onnx.GraphProto, scope: ChainMap[str, TensorProto]) -> None:
        """Adds data to the outputs of a node, if it's one to compute shapes with and what it reads has data."""
        node = alone.node[0]
        small = all(name in scope and byte_size(scope[name]) <= MAX_FOLDED for name in node.output)
        if node.domain or node.op_type not in _SHAPE_ARITHMETIC.split() or not small:
            return
        unread = node.input if node.op_type in ("Shape", "Size") else []  # a stand-in does, which takes no memory
        with contextlib.suppress(Exception), np.errstate(all="ignore"):  # of any type, mostly for want of data
            feeds = {name: np.broadcast_to(np.int8(0), scope[name].dims) for name in unread}
            arrays = reference.ReferenceEvaluator(alone, opsets=self.opsets).run(None, feeds)
            for name, array in zip(node.output, arrays, strict=True):
                scope[name] = numpy_helper.from_array(array, name)

    def count(self, node: onnx.NodeProto, scope: Mapping[str, TensorProto], times: int) -> None:
        names = {*node.input, *node.output} - {""}
        flops = _flops(node, scope) if all(name in scope for name in names) else None
        if flops is None:
            self.unknown.add(qualified(node.domain, node.op_type))
        elif node.op_type not in ("Scan", *_VIEWS.split()):
            self.flops += times * flops
            self.bytes_moved += times * sum(byte_size(scope[name]) for name in names)


def _branch_taken(node: onnx.NodeProto, scope: Mapping[str, TensorProto]) -> onnx.GraphProto | None:
    """The branch of an If whose condition follows from the sizes, or None."""
    condition = scope.get(node.input[0]) if node.op_type == "If" and not node.domain else None
    if condition is None or condition.data_location == AWAY:
        return None
    name = "then_branch" if numpy_helper.to_array(condition).item() else "else_branch"
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def _flops(node: onnx.NodeProto, scope: Mapping[str, TensorProto]) -> int | None:
    """Operations of a node without those of its body; None if no rule fits, as for the batched Scan of opset 8."""
    if node.domain or node.op_type in _NO_RULE.split() or (node.op_type == "Scan" and "" in node.input):
        return None
    if node.op_type in ("Scan", *_MOVEMENT.split()):
        return 0
    reads: list[list[int]] = [list(scope[name].dims) for name in node.input if name]
    written: list[int] = list(scope[node.output[0]].dims)
    if node.op_type in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return 2 * math.prod(written) * reads[0][-1]
    if node.op_type == "Gemm":
        return 2 * math.prod(reads[0]) * written[-1]
    if node.op_type in ("Conv", "ConvInteger"):
        return 2 * math.prod(written) * math.prod(reads[1][1:])
    return math.prod(reads[0] if node.op_type.startswith(("Arg", "Global", "Reduce", "TopK")) else written)
