"""Rivals: graphs that could stand in a body's place and were not taken, measured beside the bodies by ops.py.

LinearAttention    ONNX Runtime's own kernel for recurrences whose decay all channels share; not a standard operator
outside            a selective scan whose decays are made before the Scan, an array of frames by states by channels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

Arguments = dict[str, Any]


def discretised_outside(given: Arguments) -> onnx.ModelProto:
    """Of SelectiveScanPlain, in selective_scan.py, but for the decays."""
    channels, state = given["a"].shape
    frames, weights = f"float[batch, sequence, {channels}]", f"float[batch, sequence, {state}]"
    h, row = f"float[batch, {state}, {channels}]", f"float[batch, 1, {channels}]"
    column = f"float[batch, {state}, 1]"
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        rival ({frames} x, {frames} delta, float[{channels}, {state}] a, {weights} b, {weights} c) => ({frames} y) {{
            rows = Constant <value_ints = [2]> ()
            columns = Constant <value_ints = [3]> ()
            rates = Transpose <perm = [1, 0]> (a)
            steps = Unsqueeze (delta, rows)
            z = Mul (steps, rates)
            decay = Exp (z)
            x_rows = Unsqueeze (x, rows)
            b_columns = Unsqueeze (b, columns)
            c_rows = Unsqueeze (c, rows)
            batch = Shape <start = 0, end = 1> (decay)
            each = Shape <start = 2> (decay)
            size = Concat <axis = 0> (batch, each)
            start = ConstantOfShape (size)
            final, y_rows = Scan <
                num_scan_inputs = 4, scan_input_axes = [1, 1, 1, 1], scan_output_axes = [1],
                body = step ({h} past, {row} x_t, {h} decay_t, {column} b_t, float[batch, 1, {state}] c_t)
                    => ({h} present, {row} y_t) {{
                    left = Mul (decay_t, past)
                    added = MatMul (b_t, x_t)
                    present = Add (left, added)
                    y_t = MatMul (c_t, present)
                }}
            > (start, x_rows, decay, b_columns, c_rows)
            y = Squeeze (y_rows, rows)
        }}""")


def linear_attention(inputs: Mapping[str, Sequence[int | str]], nodes: Sequence[str], heads: int) -> onnx.ModelProto:
    """A graph with the kernel com.microsoft::LinearAttention, which is at hand on the CPU, CUDA and WebGPU.

    Args:
        inputs: of the graph, by name.
        nodes: in ONNX's text form, what makes its query, key, value and decay of them.
        heads: of queries and of keys.
    """
    declared = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in inputs.items())
    lines = "\n".join(nodes)
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        rival ({declared}) => (float[batch, sequence, width] y) {{
            {lines}
            y, state = com.microsoft.LinearAttention <
                q_num_heads = {heads}, kv_num_heads = {heads}, update_rule = "gated", scale = 1.0
            > (query, key, value, , decay)
        }}""")


def linear_scan_attention(given: Arguments) -> onnx.ModelProto:
    """One head with one key, always 1."""
    inputs: dict[str, Sequence[int | str]] = {
        "x": ["batch", "sequence", given["x"].shape[2]],
        "log_decay": ["batch", "sequence", 1],
    }
    nodes = [
        "size = Shape(log_decay)",
        "query = ConstantOfShape <value = float[1] {1}> (size)",
        "key = Identity(query)",
        "value = Identity(x)",
        "decay = Identity(log_decay)",
    ]
    return linear_attention(inputs, nodes, 1)


def diagonal_scan_attention(given: Arguments) -> onnx.ModelProto:
    """A head for each group, with as many keys as it has states."""
    groups, state = given["log_decay"].shape
    inputs: dict[str, Sequence[int | str]] = {
        "x": ["batch", "sequence", given["x"].shape[2]],
        "b": ["batch", "sequence", groups, state],
        "c": ["batch", "sequence", groups, state],
    }
    rates = ", ".join(map(str, given["log_decay"].flatten().tolist()))
    nodes = [
        "flat = Constant <value_ints = [0, 0, -1]> ()",
        "key = Reshape(b, flat)",
        "query = Reshape(c, flat)",
        f"value = Concat <axis = 2> ({', '.join(['x'] * groups)})",
        f"rates = Constant <value_floats = [{rates}]> ()",
        "size = Shape(key)",
        "decay = Expand(rates, size)",
    ]
    return linear_attention(inputs, nodes, groups)
