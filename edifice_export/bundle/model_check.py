"""A bundle's model, looked at before a runtime opens it: the files that it reads, its size, what it says of itself."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError

from ..errors import CheckError
from ..specification import TensorSpec, shape_of
from .manifest import GraphEntry, Manifest
from .nesting import check_inlined, find, qualified
from .outline import read_outline

__all__ = ["check_model"]

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.BOOL: "bool",
}


def check_model(folder: Path, name: str, content: memoryview, manifest: Manifest) -> set[str]:
    """Refuses a model that is not what the manifest says, or that ONNX Runtime would take no end of time to open.

    Args:
        folder: of the bundle.
        name: the model's file.
        content: of that file.
        manifest: of the bundle.

    Returns:
        The files of the bundle that it keeps weights in: one or none.

    Raises:
        CheckError: it is no model, reads another file than that of the manifest or beyond its end, has nodes that are
            neither ONNX's nor calls of its own functions, grows out of bounds when those are inlined, takes or gives
            other tensors than the manifest says, or says something else of itself.
    """
    files = {entry.weights for entry in manifest.graphs.values() if entry.model == name}
    try:
        model = read_outline(content)
        _check_nodes(model)
        for weights in files:
            _check_places(model, weights, manifest)
    except CheckError as error:
        raise CheckError(f"bundle {folder}: {name}: {error}; don't use this bundle") from error
    except (DecodeError, ValueError) as error:
        raise CheckError(f"bundle {folder}: {name} is not an ONNX model ({error}); build the bundle again") from error
    for graph, entry in manifest.graphs.items():
        if entry.model == name:
            _check_signature(folder, graph, entry, model)
            _check_essentials(folder, name, manifest.essentials(graph), model)
    return {weights for weights in files if weights is not None}


def _check_nodes(model: onnx.ModelProto) -> None:
    """What is neither ONNX's nor in the model might do anything, such as read a compiled graph from a file."""
    for domain, op_type, _ in check_inlined(model):
        if domain:
            raise CheckError(f"it has nodes {qualified(domain, op_type)}, which are not ONNX's and have no body in it")


def _check_places(model: onnx.ModelProto, weights: str | None, manifest: Manifest) -> None:
    """Refuses tensors, however they are nested, that are not in the model or within the file of its weights.

    Places may overlap. To ONNX Runtime, some names are no files.
    """
    for tensor in list(find(model, onnx.TensorProto)):
        if tensor.data_location == onnx.TensorProto.DEFAULT and not tensor.external_data:
            continue
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if weights is None or locations != [PurePosixPath(weights).name]:
            found = ", ".join(map(repr, locations)) or "a file without a name"
            where = weights or "the model itself"
            raise CheckError(f"it reads {found:.80}, not a file of the bundle: its weights should be in {where}")
        said = {entry.key: entry.value for entry in tensor.external_data}
        start, length = (said.get(key, "0") for key in ("offset", "length"))
        size, digits = manifest.files[weights].size, _DIGITS.fullmatch
        once = len(said) == len(tensor.external_data)
        if not (once and digits(start) and digits(length) and int(start) + int(length) <= size):
            raise CheckError(f"it reads {length:.30} bytes from {start:.30} on of {weights}, which has {size}")


_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)


def _check_signature(folder: Path, graph: str, entry: GraphEntry, model: onnx.ModelProto) -> None:
    for specs, values in ((entry.inputs, model.graph.input), (entry.outputs, model.graph.output)):
        for expected, found in itertools.zip_longest(specs, map(_spec, values)):
            if str(found) != str(expected):
                says, has = _parts(str(expected or "nothing"), str(found or "nothing"))
                raise CheckError(
                    f"bundle {folder}: the manifest says {says} and the {graph} graph has {has}; build the bundle again"
                )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorSpec(value.name, _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), shape_of(*shape))


def _check_essentials(folder: Path, name: str, essentials: Mapping[str, str], model: onnx.ModelProto) -> None:
    for key, value in essentials.items():
        found = [entry.value for entry in model.metadata_props if entry.key == key]
        if found != [value]:
            says, other = _parts(value, " and ".join(map(str, found)) or "nothing")
            raise CheckError(
                f"bundle {folder}: of {key} the manifest says {says} and {name} itself {other}; build the bundle again"
            )


_BEFORE, _SHOWN = 40, 160


def _parts(first: str, second: str) -> list[str]:
    """Of long texts what stands around the place where they differ."""
    differ = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    start = max(0, next(differ, min(len(first), len(second))) - _BEFORE)
    end = start + _SHOWN
    return [f"{'...' * (start > 0)}{text[start:end]}{'...' * (len(text) > end)}" for text in (first, second)]
