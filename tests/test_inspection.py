"""Figures of small models against numbers worked out by hand, and refusals of files which are no sound models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from edifice_export.errors import CheckError, RequestError
from edifice_export.inspection.inspect import Activation, TensorDescription, inspect_model

HEADER = '<ir_version: 8, opset_import: ["" : 18, "local" : 1]> graph '

LINEAR = f"""{HEADER}(float[batch, 3] x) => (float[batch, 5] y)
    <float[3, 5] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}, float[5] b = {{1, 2, 3, 4, 5}}> {{
    product = MatMul(x, w)
    y = Add(product, b)
}}"""

BLOCK = f"""{HEADER}(float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}> {{
    half = local.block(x, w)
    y = local.block(half, w)
}}
<domain: "local", opset_import: ["" : 18]>
block (a, b) => (c) {{
    t = MatMul(a, b)
    c = Relu(t)
}}"""

# The body declares other symbols than the graph, as exporters do, and reads a weight of the graph around it.
SCAN = f"""{HEADER}(float[batch, steps, 3] x) => (float[batch, 3] last, float[batch, rows, 3] y)
    <float[3] rate = {{1, 2, 3}}, int64[1] one = {{1}}> {{
    initial = ReduceSum<keepdims = 0>(x, one)
    last, y = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], body = step
        (float[p, q] state, float[r, q] now) => (float[s, q] next, float[s, q] out) {{
        faded = Mul(state, rate)
        next = Add(faded, now)
        out = Exp(next)
    }}>(initial, x)
}}"""


def save(folder: Path, model: str | onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    parsed = onnx.parser.parse_model(model) if isinstance(model, str) else model
    path.write_bytes(parsed.SerializeToString())
    return path


def graph_of(
    nodes: list[onnx.NodeProto], shape: list[int], weights: list[TensorProto] | None = None
) -> onnx.ModelProto:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "graph", [given], [result], weights), ir_version=8)


def test_linear(tmp_path: Path) -> None:
    path = save(tmp_path, LINEAR)
    found = inspect_model(path, {"batch": 4})
    assert found.inputs == [TensorDescription("x", "float32", ["batch", 3])]
    assert found.outputs == [TensorDescription("y", "float32", ["batch", 5])]
    assert (found.parameters, found.parameter_bytes) == (20, 80)
    assert found.disk_bytes == path.stat().st_size
    assert found.nodes == found.nodes_inlined == {"Add": 1, "MatMul": 1}
    assert (found.functions, found.opsets, found.ir_version) == ([], {"ai.onnx": 18, "local": 1}, 8)
    assert found.sizes == {"batch": 4}
    assert found.flops == 2 * 4 * 5 * 3 + 4 * 5
    assert found.bytes_moved == 4 * ((12 + 15 + 20) + (20 + 5 + 20))
    assert found.largest_activation == Activation("product", [4, 5], 80)
    assert found.unknown == []


def test_symbols_default_to_one(tmp_path: Path) -> None:
    found = inspect_model(save(tmp_path, LINEAR))
    assert found.sizes == {"batch": 1}
    assert found.flops == 2 * 5 * 3 + 5


def test_to_dict_is_json(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(LINEAR)
    helper.set_model_props(model, {"window": "60"})
    found = inspect_model(save(tmp_path, model))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["metadata"] == {"window": "60"}
    assert found.to_dict()["largest_activation"] == {"name": "product", "shape": [1, 5], "bytes": 20}
    assert list(found.to_dict()) == [field.name for field in dataclasses.fields(found)]


def test_function_is_inlined(tmp_path: Path) -> None:
    found = inspect_model(save(tmp_path, BLOCK), {"batch": 3})
    assert found.functions == ["local::block"]
    assert found.nodes == {"local::block": 2}
    assert found.nodes_inlined == {"MatMul": 2, "Relu": 2}
    assert found.flops == 2 * (2 * 3 * 2 * 2 + 3 * 2)
    assert found.bytes_moved == 2 * 4 * ((6 + 4 + 6) + (6 + 6))
    assert found.unknown == []


def test_scan_counts_every_step(tmp_path: Path) -> None:
    found = inspect_model(save(tmp_path, SCAN), {"batch": 2, "steps": 7})
    row = 2 * 3
    assert found.nodes == {"ReduceSum": 1, "Scan": 1}
    assert found.nodes_inlined == {"Add": 1, "Exp": 1, "Mul": 1, "ReduceSum": 1, "Scan": 1}
    assert found.flops == 7 * row + 7 * (3 * row)
    reduction = 4 * (7 * row) + 8 + 4 * row
    assert found.bytes_moved == reduction + 7 * 4 * ((row + 3 + row) + (row + row + row) + (row + row))
    assert found.largest_activation == Activation("x", [2, 7, 3], 4 * 7 * row)
    assert found.unknown == []


def test_scan_body_may_hold_the_largest_activation(tmp_path: Path) -> None:
    model = f"""{HEADER}(float[steps, 4] x) => (float[4] last) {{
        zero = Constant<value = float[1] {{0}}>()
        four = Constant<value_ints = [4]>()
        initial = Expand(zero, four)
        last = Scan<num_scan_inputs = 1, body = step (float[4] state, float[4] now) => (float[4] next) {{
            column = Constant<value_ints = [4, 1]>()
            upright = Reshape(now, column)
            outer = Mul(upright, state)
            axis = Constant<value_ints = [0]>()
            next = ReduceMax<keepdims = 0>(outer, axis)
        }}>(initial, x)
    }}"""
    found = inspect_model(save(tmp_path, model), {"steps": 3})
    assert found.largest_activation == Activation("outer", [4, 4], 64)
    assert found.flops == 3 * (16 + 16)
    assert found.unknown == []


@pytest.mark.parametrize("axis", [2, -1])
def test_scan_along_another_axis(tmp_path: Path, axis: int) -> None:
    model = f"""{HEADER}(float[2, 3, 5] x) => (float[2, 3] last) <float[2, 3] initial = {{0, 0, 0, 0, 0, 0}}> {{
        last = Scan<num_scan_inputs = 1, scan_input_axes = [{axis}], body = step (state, now) => (next) {{
            next = Add(state, now)
        }}>(initial, x)
    }}"""
    assert inspect_model(save(tmp_path, model)).flops == 5 * 6


def test_grouped_convolution(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((6, 2, 3), np.float32), "w")  # 4 channels in 2 groups, a kernel of 3
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    found = inspect_model(save(tmp_path, graph_of([node], [1, 4, 10], [weight])))
    assert found.flops == 2 * (6 * 8) * 2 * 3
    assert found.bytes_moved == 4 * (40 + 36 + 48)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(tmp_path: Path, transposed: int) -> None:
    weight = numpy_helper.from_array(np.ones((3, 5), np.float32), "w")
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=transposed)
    found = inspect_model(save(tmp_path, graph_of([node], [3, 4] if transposed else [4, 3], [weight])))
    assert found.flops == 2 * 4 * 5 * 3


def test_shapes_computed_by_the_graph(tmp_path: Path) -> None:
    """Shape -> Gather -> Mul -> Concat -> Reshape, and a Pad and a Range whose lengths follow from a shape."""
    model = f"""{HEADER}(float[batch, steps, 6] x) => (float[a, b, c] y, float[d, e, f] padded, int64[g] range)
        <int64[1] two = {{2}}, int64 first = {{1}}> {{
        shape = Shape(x)
        steps = Gather(shape, first)
        twice = Mul(steps, two)
        minus = Constant<value_ints = [-1]>()
        zero = Constant<value_ints = [0]>()
        split = Concat<axis = 0>(zero, twice, minus)
        y = Reshape(x, split)
        pads = Concat<axis = 0>(zero, twice, zero, zero, zero, zero)
        padded = Pad(x, pads)
        delta = Constant<value_int = 1>()
        start = Constant<value_int = 0>()
        range = Range(start, steps, delta)
        moved = Relu(y)
    }}"""
    found = inspect_model(save(tmp_path, model), {"batch": 2, "steps": 5})
    assert found.unknown == []
    assert found.flops == 1 + 60  # Mul of one number, Relu of [2, 10, 3]
    assert found.largest_activation == Activation("padded", [2, 15, 6], 720)


def test_packed_weights(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    half = numpy_helper.from_array(np.ones(3, np.float16), "h")
    found = inspect_model(save(tmp_path, graph_of([helper.make_node("Relu", ["x"], ["y"])], [2], [weight, half])))
    assert (found.parameters, found.parameter_bytes) == (3, 3 + 6)


def test_weights_listed_as_inputs(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(LINEAR)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 5]))
    found = inspect_model(save(tmp_path, model))
    assert [value.name for value in found.inputs] == ["x"]
    assert found.largest_activation == Activation("product", [1, 5], 20)


def test_what_no_rule_covers_is_named(tmp_path: Path) -> None:
    model = f"""{HEADER}(float[2, 3] x) => (float[2, 2] y, z) {{
        y = Einsum<equation = "ij,kj->ik">(x, x)
        even = Relu(y)
        z = local.mystery(x)
        after = Relu(z)
    }}"""
    found = inspect_model(save(tmp_path, model))
    assert found.unknown == ["Einsum", "Relu", "local::mystery"]
    assert found.flops == 2 * 2  # the first Relu
    assert found.bytes_moved == 4 * (4 + 4)


def test_branches_and_loops_are_named_and_count_once(tmp_path: Path) -> None:
    model = f"""{HEADER}(float[3] x, bool going) => (float[3] y, float[3] z) <int64 five = {{5}}> {{
        y = If(going)<then_branch = yes () => (float[3] a) {{ a = Relu(x) }},
                      else_branch = no () => (float[3] b) {{ t = Exp(x) b = Neg(t) }}>
        z = Loop(five, going, x)<body = step (int64 i, bool on, float[3] s) => (bool still, float[3] next) {{
            next = Abs(s)
            still = Identity(on)
        }}>
    }}"""
    found = inspect_model(save(tmp_path, model))
    assert found.unknown == ["If", "Loop"]
    assert found.flops == 3 * (1 + 2 + 1)


def external(location: str) -> onnx.ModelProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    return graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 3], [weight])


def test_external_data_counts(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(bytes(48))
    path = save(tmp_path, external("weights/w.bin"))
    found = inspect_model(path)
    assert found.disk_bytes == path.stat().st_size + 48
    assert (found.parameters, found.parameter_bytes) == (12, 48)
    assert found.flops == 2 * 2 * 4 * 3


def test_external_data_may_be_missing(tmp_path: Path) -> None:
    path = save(tmp_path, external("w.bin"))
    found = inspect_model(path)
    assert (found.disk_bytes, found.parameter_bytes) == (path.stat().st_size, 48)


def test_external_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a shape, which ONNX's evaluator would look for in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shape.bin").write_bytes(np.array([3, 2]).tobytes())
    shape = TensorProto(name="s", data_type=TensorProto.INT64, dims=[2], data_location=TensorProto.EXTERNAL)
    shape.external_data.add(key="location", value="shape.bin")
    nodes = [helper.make_node("Constant", [], ["s"], value=shape), helper.make_node("Reshape", ["x", "s"], ["y"])]
    assert inspect_model(save(tmp_path, graph_of(nodes, [2, 3]))).unknown == ["Reshape"]


@pytest.mark.parametrize("location", ["../w.bin", "inside/../../w.bin", "link.bin", "{outside}/w.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(48))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    path = save(folder, external(location.format(outside=tmp_path)))
    with pytest.raises(CheckError, match="outside the model's folder"):
        inspect_model(path)


def test_external_data_of_a_constant_outside_the_folder_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["y"], value=external("../w.bin").graph.initializer[0])
    with pytest.raises(CheckError, match="outside the model's folder"):
        inspect_model(save(tmp_path, graph_of([node], [1])))


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x08\x08", bytes(range(256))])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"model\.onnx.*; give the path of"):
        inspect_model(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(RequestError, match="can't inspect"):
            inspect_model(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, LINEAR)
    content = path.read_bytes()
    for kept in (1, len(content) // 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(RequestError):
            inspect_model(path)


def test_damaged_file_gives_a_clean_error_or_json(tmp_path: Path) -> None:
    path = save(tmp_path, SCAN)
    content = path.read_bytes()
    refused = 0
    for position, byte in enumerate(content):
        path.write_bytes(content[:position] + bytes([byte ^ 0xFF]) + content[position + 1 :])
        try:
            json.dumps(inspect_model(path).to_dict())
        except (CheckError, RequestError):
            refused += 1
    assert 0 < refused < len(content)


def test_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, LINEAR)
    path.write_bytes(path.read_bytes().replace(b"batch", b"b\xfftch"))
    with pytest.raises(RequestError, match="dim_param is not UTF-8"):
        inspect_model(path)


@pytest.mark.parametrize("sizes", [{"batches": 4}, {"batch": 0}, {"batch": -1}, {"batch": 10**30}])
def test_sizes_are_checked(tmp_path: Path, sizes: dict[str, int]) -> None:
    (name, size) = next(iter(sizes.items()))
    message = f"size {name}={size}: the inputs' symbols are: batch;|{name} must be .*, got {size}"
    with pytest.raises(RequestError, match=message):
        inspect_model(save(tmp_path, LINEAR), sizes)


def test_enormous_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"tensor 'x' has shape \[1125899906842624, 3\]"):
        inspect_model(save(tmp_path, LINEAR), {"batch": 2**50})


@pytest.mark.parametrize("dims", [[-2], [-2, -3], [2**62, 2**62], [0, 2**62]])
def test_absurd_dimensions_are_refused(tmp_path: Path, dims: list[int]) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    for model in (graph_of([node], dims), graph_of([node], [1], [weight])):
        with pytest.raises(CheckError, match="has shape"):
            inspect_model(save(tmp_path, model))


def nested(depth: int, last: str) -> onnx.ModelProto:
    """A graph that calls f0; every function calls the next one twice, the last one an operator or function."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    names = [f"f{index}" for index in range(depth)]
    model = graph_of([helper.make_node("f0", ["x"], ["y"], domain="local")], [1])
    for name, called in zip(names, [*names[1:], last], strict=True):
        domain = "local" if called in names else ""
        nodes = [helper.make_node(called, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        model.functions.append(helper.make_function("local", name, ["a"], ["c"], nodes, opsets))
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model


def test_functions_may_nest(tmp_path: Path) -> None:
    assert inspect_model(save(tmp_path, nested(5, "Relu"))).nodes_inlined == {"Relu": 32}


def test_function_bomb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="more than 200000 nodes"):
        inspect_model(save(tmp_path, nested(40, "Relu")))


def test_overloads_are_functions_of_their_own(tmp_path: Path) -> None:
    """Each calls the next one a thousand times: a million nodes, and a thousand where they are taken for one."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    model = graph_of([helper.make_node("f", ["x"], ["y"], domain="local", overload="0")], [1])
    for overload in range(2):
        called = ("f", "local", "1") if overload == 0 else ("Relu", "", "")
        nodes = [
            helper.make_node(called[0], [f"v{i}"], [f"v{i + 1}"], domain=called[1], overload=called[2])
            for i in range(1000)
        ]
        model.functions.append(helper.make_function("local", "f", ["v0"], ["v1000"], nodes, opsets))
        model.functions[-1].overload = str(overload)
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    with pytest.raises(CheckError, match="more than 200000 nodes with functions inlined"):
        inspect_model(save(tmp_path, model))
    for function in model.functions:
        function.overload = "0"
    with pytest.raises(CheckError, match=r"two functions local::f \(0\)"):
        inspect_model(save(tmp_path, model))


def test_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="local::f0 calls itself"):
        inspect_model(save(tmp_path, nested(2, "f0")))


def test_scans_in_scans_are_not_walked_for_ages(tmp_path: Path) -> None:
    """Every step of a Scan over what is known is walked: a small file must not ask for millions."""

    def scan(level: int) -> onnx.GraphProto:
        steps = numpy_helper.from_array(np.arange(400, dtype=np.int8), f"steps{level}")
        x = helper.make_tensor_value_info(f"x{level}", TensorProto.INT8, None)
        y = helper.make_tensor_value_info(f"y{level}", TensorProto.INT8, None)
        if level == 0:
            return helper.make_graph([helper.make_node("Neg", ["x0"], ["y0"])], "body", [x], [y])
        node = helper.make_node("Scan", [f"steps{level}"], [f"y{level}"], body=scan(level - 1), num_scan_inputs=1)
        return helper.make_graph([node], f"level{level}", [x] if level < 3 else [], [y], [steps])

    model = helper.make_model(scan(3), opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckError, match=r"Scans take more than 20000 steps"):
        inspect_model(tmp_path / "model.onnx")
