"""Products: every dense layer that the input passes in the reference model, alone, on the CPU.

products       in torch: the measure of all ratios
ort-products   in ONNX Runtime: a graph that runs these products there takes no less. It may run fewer: most of the
               last layer's are needed for the last frame alone
gemv           of a single frame, as products of a matrix and a vector, torch's fastest form of them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from edifice_reference.models.contract import ReferenceModel

from ..bundle.bundle import save_model
from ..runtime.providers import open_session
from .contestants import Contestant, Subject, forward
from .plan import Point

__all__ = ["products"]

Layer = tuple[nn.Linear, Tensor]
"""With its input; layers whose inputs have one shape share one: what is measured takes little memory."""


def products(subject: Subject, point: Point, frames: np.ndarray, folder: Path) -> list[Contestant]:
    """`products`, `ort-products`, and of one single frame `gemv`.

    Args:
        subject: what is measured.
        point: where.
        frames: the input.
        folder: for a model.
    """
    layers = _passed(subject.frozen, point, torch.tensor(frames))

    @torch.inference_mode()
    def linear() -> None:
        for layer, x in layers:
            functional.linear(x, layer.weight, layer.bias)

    @torch.inference_mode()
    def gemv() -> None:
        for layer, x in layers:
            torch.addmv(layer.bias, layer.weight, x[0])

    in_onnx = _in_onnx(layers, point, subject.bundle.manifest.opset, folder / "products.onnx")
    found = [Contestant("products", linear), Contestant("ort-products", in_onnx)]
    return [*found, Contestant("gemv", gemv)] if point.graph == "stream" and point.batch == 1 else found


def _passed(model: ReferenceModel, point: Point, frames: Tensor) -> list[Layer]:
    passed: list[tuple[nn.Linear, tuple[int, ...]]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, _: passed.append((layer, tuple(given[0].shape))))
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    with torch.inference_mode():
        forward(model, point, frames)()
        given = {shape: torch.randn(shape) for _, shape in passed}
    for hook in hooks:
        hook.remove()
    return [(layer, given[shape]) for layer, shape in passed]


def _in_onnx(layers: Sequence[Layer], point: Point, opset: int, path: Path) -> Callable[[], None]:
    """A graph of nothing but these layers. Their results are not kept: it gives the sizes of them."""
    given = {tuple(x.shape): x.numpy() for _, x in layers}
    names = {shape: f"x{index}" for index, shape in enumerate(given)}
    nodes, weights, outputs = [], [], []
    for index, (layer, x) in enumerate(layers):
        matrix, bias, product, sum_, size = (f"{kind}{index}" for kind in ("matrix", "bias", "product", "sum", "size"))
        weights.append(onnx.numpy_helper.from_array(layer.weight.detach().T.contiguous().numpy(), matrix))
        nodes.append(onnx.helper.make_node("MatMul", [names[tuple(x.shape)], matrix], [product]))
        weights.append(onnx.numpy_helper.from_array(layer.bias.detach().numpy(), bias))
        nodes.append(onnx.helper.make_node("Add", [product, bias], [sum_]))
        nodes.append(onnx.helper.make_node("Shape", [sum_], [size]))
        outputs.append(onnx.helper.make_tensor_value_info(size, onnx.TensorProto.INT64, [x.ndim]))
    # Free sizes: known ones would be folded to constants, and the products with them.
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, [*(f"{name}_{axis}" for axis in range(len(shape) - 1)), shape[-1]]
        )
        for shape, name in names.items()
    ]
    graph = onnx.helper.make_graph(nodes, "products", inputs, outputs, weights)
    save_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10), path)
    session = open_session(path, ["cpu"], point.threads)
    feeds = {name: given[shape] for shape, name in names.items()}

    def run() -> None:
        session.run(None, feeds)

    return run
