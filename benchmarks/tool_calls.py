"""How each tool is called, as its own documentation has it, and what is right of what it makes."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort

__all__ = ["TOOLS", "Tool"]

Arrays = dict[str, np.ndarray]
Made = Path | onnx.ModelProto | Arrays | None
"""A model to run, or what the tool itself computed; None where it only looks."""

EXACT, HALF, INT8 = 1e-5, 1e-2, 0.5
"""Largest error, of the largest output or of 1: float32 rounding; float16's; that of weights in 8 bits."""

_MESSAGE = 150


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        package: that it comes in.
        call: takes a model, an empty folder and inputs.
        allowed: largest error of what is right.
    """

    package: str
    call: Callable[[Path, Path, Arrays], Made]
    allowed: float = EXACT

    def verdict(self, model: Path, folder: Path, inputs: Arrays, outputs: Arrays) -> str:
        """What comes of a graph: `right`, `wrong by`, or which step fails and the message."""
        try:
            made = self.call(model, folder, inputs)
        except Exception as error:  # whatever tools raise is a finding
            return f"refuses: {_brief(error)}"
        if made is None:
            return "right"
        try:
            found = made if isinstance(made, dict) else _run(made, inputs)
        except Exception as error:
            return f"fails to load: {_brief(error)}"
        error = max(_error(found[name], wanted) for name, wanted in outputs.items())
        return "right" if error <= self.allowed else f"wrong by {error:.0e}"


def _run(made: Path | onnx.ModelProto, inputs: Arrays) -> Arrays:
    content = str(made) if isinstance(made, Path) else made.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / max(1.0, np.abs(wanted).max()))


def _brief(error: Exception) -> str:
    """The first line of a message, without paths and addresses, which differ from run to run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = re.sub(r"/\S+/|0x[0-9a-f]+", "", f"{type(error).__name__}: {' '.join(lines)}")
    return text.replace("`", "'").replace("|", "/")[:_MESSAGE]


def _checker(model: Path, _: Path, __: Arrays) -> Made:
    onnx.checker.check_model(str(model), full_check=True)
    return None


def _reference(model: Path, _: Path, inputs: Arrays) -> Made:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def _inliner(model: Path, _: Path, __: Arrays) -> Made:
    from onnx import inliner

    return inliner.inline_local_functions(onnx.load(model))


def _version_converter(model: Path, _: Path, __: Arrays) -> Made:
    from onnx import version_converter

    return version_converter.convert_version(onnx.load(model), 21)


def _compose(model: Path, _: Path, __: Arrays) -> Made:
    """A head that takes the first output and gives it on, under prefixes, which are taken off for the comparison."""
    from onnx import compose, helper

    body = onnx.load(model)
    output = body.graph.output[0]
    given = helper.make_tensor_value_info(
        "y", output.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in output.type.tensor_type.shape.dim]
    )
    taken = onnx.ValueInfoProto()
    taken.CopyFrom(given)
    taken.name = "x"
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "head", [taken], [given])
    head = helper.make_model(
        graph, opset_imports=[o for o in body.opset_import if not o.domain], ir_version=body.ir_version
    )
    merged = compose.merge_models(body, head, [(output.name, "x")], prefix1="model/", prefix2="head/")
    names = {"head/y": output.name} | {
        f"model/{value.name}": value.name for value in [*body.graph.input, *body.graph.output[1:]]
    }
    return _renamed(merged, names)


def _renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    return model


def _extract(model: Path, folder: Path, _: Arrays) -> Made:
    from onnx.utils import extract_model

    graph = onnx.load(model).graph
    extract_model(model, folder / "model.onnx", [v.name for v in graph.input], [v.name for v in graph.output])
    return folder / "model.onnx"


def _quantize_dynamic(model: Path, folder: Path, _: Arrays) -> Made:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model, folder / "model.onnx")
    return folder / "model.onnx"


def _quantize_static(model: Path, folder: Path, inputs: Arrays) -> Made:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.examples: Iterator[Arrays] = iter([inputs])

        def get_next(self) -> Arrays | None:
            return next(self.examples, None)

    quantize_static(model, folder / "model.onnx", Reader())
    return folder / "model.onnx"


def _quant_pre_process(model: Path, folder: Path, _: Arrays) -> Made:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(model), str(folder / "model.onnx"))
    return folder / "model.onnx"


def _float16(model: Path, _: Path, __: Arrays) -> Made:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load(model), keep_io_types=True)


def _symbolic_shapes(model: Path, _: Path, __: Arrays) -> Made:
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    return SymbolicShapeInference.infer_shapes(onnx.load(model), auto_merge=True)


def _ort_format(model: Path, folder: Path, _: Arrays) -> Made:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return folder / "model.ort"


def _onnxslim(model: Path, _: Path, __: Arrays) -> Made:
    import onnxslim

    return onnxslim.slim(onnx.load(model))


def _onnxsim(model: Path, _: Path, __: Arrays) -> Made:
    import onnxsim

    simplified, _checked = onnxsim.simplify(onnx.load(model))
    return simplified


def _graphsurgeon(model: Path, _: Path, __: Arrays) -> Made:
    import onnx_graphsurgeon as gs

    return gs.export_onnx(gs.import_onnx(onnx.load(model)).cleanup().toposort())


def _openvino(model: Path, _: Path, inputs: Arrays) -> Made:
    import openvino as ov

    converted = ov.convert_model(str(model))
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    found = ov.Core().compile_model(converted, "CPU", precise)(inputs)
    return {name: value for output, value in found.items() for name in output.names}


def _onnx2torch(model: Path, _: Path, inputs: Arrays) -> Made:
    # It imports torchvision, for operators of no graph here; PyPI's does not load beside the CPU build of torch.
    for name in ("torchvision", "torchvision.ops"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    vars(sys.modules["torchvision.ops"])["roi_align"] = None
    import onnx2torch
    import torch

    graph = onnx.load(model).graph
    with torch.no_grad():
        found = onnx2torch.convert(model)(*(torch.tensor(inputs[value.name]) for value in graph.input))
    outputs = [found] if torch.is_tensor(found) else found
    return {value.name: output.numpy() for value, output in zip(graph.output, outputs, strict=True)}


TOOLS = {
    "onnx.checker": Tool("onnx", _checker),
    "onnx.reference": Tool("onnx", _reference),
    "onnx.inliner": Tool("onnx", _inliner),
    "onnx.version_converter": Tool("onnx", _version_converter),
    "onnx.compose.merge_models": Tool("onnx", _compose),
    "onnx.utils.extract_model": Tool("onnx", _extract),
    "quantize_dynamic": Tool("onnxruntime", _quantize_dynamic, INT8),
    "quantize_static": Tool("onnxruntime", _quantize_static, INT8),
    "quant_pre_process": Tool("onnxruntime", _quant_pre_process),
    "float16": Tool("onnxruntime", _float16, HALF),
    "symbolic_shape_infer": Tool("onnxruntime", _symbolic_shapes),
    "ORT format": Tool("onnxruntime", _ort_format),
    "onnxslim": Tool("onnxslim", _onnxslim),
    "onnxsim": Tool("onnxsim", _onnxsim),
    "onnx-graphsurgeon": Tool("onnx-graphsurgeon", _graphsurgeon),
    "openvino.convert_model": Tool("openvino", _openvino),
    "onnx2torch": Tool("onnx2torch", _onnx2torch),
}
