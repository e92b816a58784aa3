"""The last frame of edifice::FftConv alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["last_of_fft_conv"]

_END = 2**63 - 1


def last_of_fft_conv(node: ir.Node) -> Sequence[ir.Node]:
    """A product of the frames and the taps that meet them, the oldest frame's first, summed over time.

    Of a window of one frame, a longer sequence would be multiplied instead of refused: there it is nothing.
    """
    x, kernel = node.inputs
    is_constant = kernel is not None and kernel.is_initializer() and not kernel.is_graph_input()
    if kernel is None or not is_constant or kernel.const_value is None or kernel.const_value.shape[0] == 1:
        return []
    oldest_first = _constant(f"{kernel.name}.oldest_first", kernel.const_value.numpy()[::-1])
    axis0, axis1, end = (
        _constant(name, np.array([number], np.int64))
        for name, number in (("axis_0", 0), ("axis_1", 1), (f"end_{_END}", _END))
    )
    length = ir.node("Shape", [x], {"start": 1, "end": 2}, name=f"{node.name}/length")
    start = ir.node("Neg", [length.outputs[0]], name=f"{node.name}/start")
    taps = ir.node("Slice", [oldest_first, start.outputs[0], end, axis0], name=f"{node.name}/taps")
    met = ir.node("Mul", [x, taps.outputs[0]], name=f"{node.name}/met")
    total = ir.node("ReduceSum", [met.outputs[0], axis1], {"keepdims": 1}, name=f"{node.name}/last")
    for each in (length, start, taps, met):
        each.outputs[0].name = each.name
    return length, start, taps, met, total


def _constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(np.array(array, order="C"), name=name))
