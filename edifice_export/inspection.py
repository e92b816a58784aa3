"""What a model holds and what one window of it costs, worked out from the graph alone: nothing of the model runs.

- A matrix product takes 2 * M * N * K operations, a convolution 2 * output elements * channels per group * kernel size,
  data movement none, a reduction one per element read, any other operator one per element of its first output.
- A node reads each input whole and writes each output whole, once; weights are inputs. A view moves nothing.
- The body of a Scan counts once per step, of an If whose condition follows from the sizes the branch that is taken.
  Each body of a Loop or of another If counts once, and these are named in `unknown`, as is what is left out: ONNX can't
  tell its shapes, or the rules would be far off (Einsum, pooling, recurrent layers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, reference, shape_inference
from onnx.helper import tensor_dtype_to_np_dtype as _dtype

from .errors import CheckError, ExportError, RequestError

__all__ = ["Activation", "Inspection", "TensorDescription", "inspect_model"]

_MAX_ELEMENTS = 2**50  # of one tensor: ONNX's shape inference multiplies dimensions without a check for overflow
_MAX_NODES = 200_000  # after inlining: twenty functions, each calling the next one twice, make a million nodes
_MAX_FOLDED = 2048  # bytes of a tensor whose data is kept: shapes, axes and pads are far smaller
_AWAY = TensorProto.EXTERNAL  # the data_location of a tensor of which only the type and shape are known

_VIEWS = "Constant Flatten Identity Reshape Shape Size Squeeze Unsqueeze"
_MOVEMENT = f"""{_VIEWS} BitCast Cast CastLike CenterCropPad Compress Concat ConstantOfShape DepthToSpace Dropout Expand
EyeLike Gather GatherElements GatherND NonZero OneHot Pad Range ReverseSequence Scatter ScatterElements ScatterND Slice
SpaceToDepth Split TensorScatter Tile Transpose Trilu Where"""
# What exporters compute shapes with. Each takes time bounded by the sizes of its inputs and outputs.
_SHAPE_ARITHMETIC = f"""{_VIEWS} Abs Add And Cast CastLike Ceil Concat ConstantOfShape Div Equal Expand Floor Gather
Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Not Or ReduceMax ReduceMin ReduceProd ReduceSum Round Slice
Split Sqrt Sub Transpose Where"""
_NO_RULE = """Attention AveragePool CausalConvWithState ConvTranspose DFT DeformConv Det Einsum GRU If LSTM
LinearAttention Loop LpPool MaxPool NegativeLogLikelihoodLoss QLinearConv RNN RoiAlign STFT SoftmaxCrossEntropyLoss"""
_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}  # packed in ONNX, a byte each in numpy


@dataclasses.dataclass(frozen=True)
class TensorDescription:
    """An input or output. A free dimension is its symbol, or "?" if it has none; an unknown rank is ["..."]."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclasses.dataclass(frozen=True)
class Activation:
    """A tensor that depends on the input, under its name in the inlined graph."""

    name: str
    shape: list[int]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model holds, and what a window costs at the given sizes (the module says how that is counted)."""

    inputs: list[TensorDescription]
    outputs: list[TensorDescription]
    parameters: int  # elements in floating-point initializers
    parameter_bytes: int  # all initializers
    disk_bytes: int  # the file and the external data files it names
    nodes: dict[str, int]  # operator: count in the main graph, the most frequent first
    nodes_inlined: dict[str, int]  # the same with functions inlined and the nodes of subgraphs, each counted once
    functions: list[str]
    opsets: dict[str, int]
    ir_version: int
    sizes: dict[str, int]  # symbol of the inputs: the number used for it
    flops: int
    bytes_moved: int
    largest_activation: Activation | None  # inputs and values inside bodies too; None: nothing depends on an input
    metadata: dict[str, str]
    unknown: list[str]  # operators that flops and bytes_moved leave out, or whose bodies they count once

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def inspect_model(path: str | Path, sizes: Mapping[str, int] | None = None) -> Inspection:
    """Inspects any ONNX model.

    Args:
        path: a .onnx file.
        sizes: a number for symbols of the inputs, such as {"sequence": 60}; every other free dimension counts as 1.

    Raises:
        RequestError: the file is not a readable ONNX model, or a size is not positive or names no symbol of the inputs.
        CheckError: external data outside the model's folder, too many nodes, absurd dimensions.
    """
    try:
        return _inspect(Path(path), sizes or {})
    except ExportError:
        raise
    except Exception as error:  # on a damaged file protobuf, ONNX's C++ and numpy raise a dozen types
        raise RequestError(f"can't inspect {path}: {error!r}; give the path of a sound ONNX model") from error


def _inspect(path: Path, asked: Mapping[str, int]) -> Inspection:
    model = onnx.load_model_from_string(path.read_bytes())
    if not (model.ir_version and model.opset_import and model.graph.output):
        raise RequestError(f"{path} holds no ONNX version, operator set or output; give the path of a whole ONNX model")
    files = {path.resolve(), *_strip(model, path.parent)}
    weights = [weight for graph in _find(model, onnx.GraphProto) for weight in graph.initializer]
    names = {weight.name for weight in weights}
    inlined = _inline(model)
    sizes = _set_sizes(inlined.graph.input, asked)
    walk = _Walk({opset.domain: opset.version for opset in inlined.opset_import})
    walk.graph(inlined.graph, ChainMap(), live=True, times=1)
    return Inspection(
        inputs=[_describe(value) for value in model.graph.input if value.name not in names],  # IR 3 lists weights too
        outputs=[_describe(value) for value in model.graph.output],
        parameters=sum(math.prod(weight.dims) for weight in weights if "float" in _dtype(weight.data_type).name),
        parameter_bytes=sum(_bytes(weight) for weight in weights),
        disk_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        nodes=_count(model.graph.node),
        nodes_inlined=_count(_find(inlined.graph, onnx.NodeProto)),
        functions=[_qualified(function.domain, function.name) for function in model.functions],
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        ir_version=model.ir_version,
        sizes=sizes,
        flops=walk.flops,
        bytes_moved=walk.bytes_moved,
        largest_activation=walk.largest,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        unknown=sorted(walk.unknown),
    )


def _find(message: Any, kind: type) -> Iterator[Any]:
    """Every message of one kind inside another, at any depth; protobuf's parser bounds that depth."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING and isinstance(value, bytes):
            raise ValueError(f"{field.full_name} is not UTF-8")
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from [item] if isinstance(item, kind) else []
                yield from _find(item, kind)


def _strip(model: onnx.ModelProto, folder: Path) -> Iterator[Path]:
    """Drops the data of large tensors, which no figure depends on, and yields the files of those stored outside."""
    for tensor in _find(model, TensorProto):
        code, dims, small = tensor.data_type, tensor.dims, _bytes(tensor) <= _MAX_FOLDED
        if tensor.data_location == _AWAY:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            file = (folder / location).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise CheckError(f"tensor {tensor.name!r} is in {location!r}, outside the model's folder; don't use it")
            yield file
        elif small:
            continue
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=code, dims=dims, data_location=_AWAY))


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inlines the model's functions, once it's sure that few enough nodes will result."""
    bodies = {(f.domain, f.name): f for f in model.functions} | {("", ""): model.graph}
    calls = {key: Counter((n.domain, n.op_type) for n in _find(body, onnx.NodeProto)) for key, body in bodies.items()}
    sizes: dict[tuple[str, str], int] = {}
    for key in TopologicalSorter(calls).static_order():
        sizes[key] = sum(count * sizes[call] for call, count in calls[key].items()) if key in calls else 1
        if sizes[key] > _MAX_NODES:
            raise CheckError(f"the graph has more than {_MAX_NODES} nodes with functions inlined; give a smaller model")
    return inliner.inline_local_functions(model)


def _set_sizes(inputs: Iterable[onnx.ValueInfoProto], asked: Mapping[str, int]) -> dict[str, int]:
    """Gives every free dimension of the inputs its number, and returns the number of every symbol."""
    dims = [dim for value in inputs for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")]
    sizes = {dim.dim_param: asked.get(dim.dim_param, 1) for dim in dims if dim.dim_param}
    for symbol, size in asked.items():
        if symbol not in sizes or not 0 < size <= _MAX_ELEMENTS:
            symbols = ", ".join(sizes) or "none"
            raise RequestError(f"size {symbol}={size}: the inputs' symbols are: {symbols}; give a positive size to one")
    for dim in dims:
        dim.dim_value = sizes.get(dim.dim_param, 1)
    return sizes


def _describe(value: onnx.ValueInfoProto) -> TensorDescription:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    dtype = _dtype(tensor.elem_type).name if tensor.elem_type else value.type.WhichOneof("value") or "undefined"
    return TensorDescription(value.name, dtype, shape if tensor.HasField("shape") else ["..."])


def _qualified(domain: str, name: str) -> str:
    return f"{domain}::{name}" if domain else name


def _count(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    return dict(Counter(sorted(_qualified(node.domain, node.op_type) for node in nodes)).most_common())


def _bytes(tensor: TensorProto) -> int:
    if min(tensor.dims, default=0) < 0 or math.prod(filter(None, tensor.dims)) > _MAX_ELEMENTS:
        raise CheckError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}; give smaller sizes or another model")
    elements, dtype = int(math.prod(tensor.dims)), _dtype(tensor.data_type)
    return -(-elements * _BITS.get(dtype.name, 8 * dtype.itemsize) // 8)


class _Walk:
    """One pass over an inlined graph, which works out each tensor and counts each node."""

    def __init__(self, opsets: dict[str, int]) -> None:
        self.opsets = opsets
        self.flops = self.bytes_moved = 0
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
            names = {name for inner in (node, *_find(node, onnx.NodeProto)) for name in inner.input}
            alone = self.infer(node, [scope[name] for name in names if name in scope])
            depends = not self.live.isdisjoint(names)
            taken = _branch_taken(node, scope)
            if taken is not None:
                inner = self.graph(taken, scope, depends, times)
                self.pass_on(taken, node, inner, scope)
                continue
            self.define(alone.output, scope, depends)
            self.fold(alone, scope)
            self.count(node, scope, times)
            axes = [attribute.ints[-1] for attribute in node.attribute if attribute.name == "scan_input_axes"] or [0]
            scans = node.op_type == "Scan" and node.input[-1] in scope
            steps = scope[node.input[-1]].dims[axes[0]] if scans else 1
            for attribute in alone.node[0].attribute:
                self.graph(attribute.g, scope, depends, times * steps)  # an empty graph, if it is another attribute
        return scope

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
        data = [tensor for tensor in known if tensor.data_location != _AWAY]
        graph = helper.make_graph([node], "alone", inputs, outputs, data)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in self.opsets.items()])
        return shape_inference.infer_shapes(model, data_prop=True).graph

    def define(self, values: Iterable[onnx.ValueInfoProto], scope: ChainMap[str, TensorProto], live: bool) -> None:
        """Adds those tensors to the scope that hold numbers and have a known shape."""
        for name, kind in ((value.name, value.type.tensor_type) for value in values):
            dims = [dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value")]
            if kind.HasField("shape") and len(dims) == len(kind.shape.dim) and kind.elem_type != TensorProto.STRING:
                scope[name] = TensorProto(name=name, data_type=kind.elem_type, dims=dims, data_location=_AWAY)
                (self.live.add if live else self.live.discard)(name)
                size = _bytes(scope[name])
                if live and (self.largest is None or size > self.largest.bytes):
                    self.largest = Activation(name, dims, size)

    def fold(self, alone: onnx.GraphProto, scope: ChainMap[str, TensorProto]) -> None:
        """Adds data to the outputs of a node, if it's one to compute shapes with and what it reads has data."""
        node = alone.node[0]
        small = all(name in scope and _bytes(scope[name]) <= _MAX_FOLDED for name in node.output)
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
            self.unknown.add(_qualified(node.domain, node.op_type))
        elif node.op_type not in ("Scan", *_VIEWS.split()):
            self.flops += times * flops
            self.bytes_moved += times * sum(_bytes(scope[name]) for name in names)


def _branch_taken(node: onnx.NodeProto, scope: Mapping[str, TensorProto]) -> onnx.GraphProto | None:
    """The branch of an If whose condition follows from the sizes, or None."""
    condition = scope.get(node.input[0]) if node.op_type == "If" and not node.domain else None
    if condition is None or condition.data_location == _AWAY:
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
