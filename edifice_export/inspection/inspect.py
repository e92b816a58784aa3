"""What a model holds and what one window of it costs (see costs), from the graph alone: nothing of the model runs."""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, inliner

from ..arguments import mapping, path_of, whole_number
from ..bundle.nesting import check_inlined, find, qualified
from ..errors import CheckError, ExportError, RequestError, brief
from .costs import AWAY, MAX_ELEMENTS, MAX_FOLDED, Activation, Walk, byte_size, dtype_of

__all__ = ["Activation", "Inspection", "TensorDescription", "inspect_model"]


@dataclasses.dataclass(frozen=True)
class TensorDescription:
    """An input or output. A free dimension is its symbol, or "?" if it has none; an unknown rank is ["..."]."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model holds, and what a window costs at the given sizes (costs says how that is counted)."""

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
    place, asked = path_of("path", path), mapping("sizes", sizes if sizes is not None else {}, "numbers by symbol")
    try:
        return _inspect(place, asked)
    except ExportError:
        raise
    except Exception as error:  # on a damaged file protobuf, ONNX's C++ and numpy raise a dozen types
        raise RequestError(
            f"can't inspect {path}: {type(error).__name__}: {brief(error)}; give the path of a sound ONNX model"
        ) from error


def _inspect(path: Path, asked: Mapping[str, int]) -> Inspection:
    model = onnx.load_model_from_string(path.read_bytes())
    if not (model.ir_version and model.opset_import and model.graph.output):
        raise RequestError(f"{path} holds no ONNX version, operator set or output; give the path of a whole ONNX model")
    files = {path.resolve(), *_strip(model, path.parent)}
    weights = [weight for graph in find(model, onnx.GraphProto) for weight in graph.initializer]
    names = {weight.name for weight in weights}
    check_inlined(model)
    inlined = inliner.inline_local_functions(model)
    sizes = _set_sizes(inlined.graph.input, asked)
    walk = Walk({opset.domain: opset.version for opset in inlined.opset_import})
    walk.graph(inlined.graph, ChainMap(), live=True, times=1)
    return Inspection(
        inputs=[_describe(value) for value in model.graph.input if value.name not in names],  # IR 3 lists weights too
        outputs=[_describe(value) for value in model.graph.output],
        parameters=sum(math.prod(weight.dims) for weight in weights if "float" in dtype_of(weight.data_type).name),
        parameter_bytes=sum(byte_size(weight) for weight in weights),
        disk_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        nodes=_count(model.graph.node),
        nodes_inlined=_count(find(inlined.graph, onnx.NodeProto)),
        functions=[qualified(function.domain, function.name) for function in model.functions],
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        ir_version=model.ir_version,
        sizes=sizes,
        flops=walk.flops,
        bytes_moved=walk.bytes_moved,
        largest_activation=walk.largest,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        unknown=sorted(walk.unknown),
    )


def _strip(model: onnx.ModelProto, folder: Path) -> Iterator[Path]:
    """Drops the data of large tensors, which no figure depends on, and yields the files of those stored outside."""
    for tensor in find(model, TensorProto):
        code, dims, small = tensor.data_type, tensor.dims, byte_size(tensor) <= MAX_FOLDED
        if tensor.data_location == AWAY:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            file = (folder / location).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise CheckError(f"tensor {tensor.name!r} is in {location!r}, outside the model's folder; don't use it")
            yield file
        elif small:
            continue
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=code, dims=dims, data_location=AWAY))


def _set_sizes(inputs: Iterable[onnx.ValueInfoProto], asked: Mapping[str, int]) -> dict[str, int]:
    """Gives every free dimension of the inputs its number, and returns the number of every symbol."""
    dims = [dim for value in inputs for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")]
    sizes = {dim.dim_param: asked.get(dim.dim_param, 1) for dim in dims if dim.dim_param}
    for symbol, size in asked.items():
        if symbol not in sizes:
            symbols = ", ".join(sizes) or "none"
            raise RequestError(f"size {symbol}={size}: the inputs' symbols are: {symbols}; give a size to one of them")
        sizes[symbol] = whole_number(symbol, size, 1, MAX_ELEMENTS)
    for dim in dims:
        dim.dim_value = sizes.get(dim.dim_param, 1)
    return sizes


def _describe(value: onnx.ValueInfoProto) -> TensorDescription:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    dtype = dtype_of(tensor.elem_type).name if tensor.elem_type else value.type.WhichOneof("value") or "undefined"
    return TensorDescription(value.name, dtype, shape if tensor.HasField("shape") else ["..."])


def _count(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    return dict(Counter(sorted(qualified(node.domain, node.op_type) for node in nodes)).most_common())
