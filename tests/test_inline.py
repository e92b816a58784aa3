"""Inlined graphs: no function, the same values under the same names; and what ONNX's own evaluator makes of graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import TINY
from lowered import nodes as all_nodes
from module_cases import SOURCES, exported
from onnx.reference import ReferenceEvaluator

import edifice_export as ee
from edifice_export.building.export import export_source
from edifice_export.building.inline import inline
from edifice_export.building.link import link
from edifice_export.building.settings import Settings
from edifice_export.bundle.bundle import open_bundle
from edifice_export.bundle.manifest import GRAPHS
from edifice_export.graph.trace import trace
from edifice_export.inspection.inspect import inspect_model
from edifice_export.inspection.report import explain
from edifice_export.passes import optimize
from edifice_export.programs.graphs import entry
from edifice_export.programs.reference_model import reference_of
from edifice_export.programs.source import load_source

Arrays = dict[str, np.ndarray]


def linked_model(bundle: ee.Bundle, graph: str) -> onnx.ModelProto:
    return onnx.load(bundle.file(f"{graph}/model.onnx"))


def example(bundle: ee.Bundle, graph: str) -> tuple[Arrays, Arrays]:
    return next(bundle.test_data(graph))[1:]


def said(model: onnx.ModelProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in model.metadata_props}


def in_onnx_runtime(model: onnx.ModelProto, inputs: Arrays, names: list[str]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(names, inputs)


def assert_plain(model: onnx.ModelProto) -> None:
    """Standard operators alone, wherever they stand, and sound."""
    assert not model.functions
    assert {node.domain for node in all_nodes(model.graph.node)} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    onnx.checker.check_model(model, full_check=True)


def assert_near(found: list[np.ndarray], wanted: Arrays) -> None:
    for value, (name, expected) in zip(found, wanted.items(), strict=True):
        error = np.abs(value - expected).max()
        assert error <= 1e-5 * max(1.0, np.abs(expected).max()), name


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_inlined_graph_is_plain_and_computes_the_same(bundle: ee.Bundle, graph: str, tmp_path: Path) -> None:
    model = linked_model(bundle, graph)
    before = model.SerializeToString(deterministic=True)
    plain = inline(model)
    assert model.SerializeToString(deterministic=True) == before
    assert_plain(plain)
    assert plain.ir_version == model.ir_version
    assert said(plain) == said(model)
    assert (plain.graph.input, plain.graph.output) == (model.graph.input, model.graph.output)
    values = {name for node in plain.graph.node for name in node.output}
    values |= {tensor.name for tensor in plain.graph.initializer}
    assert not {value.name for value in plain.graph.value_info} & {tensor.name for tensor in plain.graph.initializer}
    assert {name for node in model.graph.node for name in node.output} <= values
    inputs, outputs = example(bundle, graph)
    assert_near(in_onnx_runtime(plain, inputs, list(outputs)), outputs)
    onnx.save(model, tmp_path / "model.onnx")
    onnx.save(plain, tmp_path / "plain.onnx")
    assert explain(tmp_path / "plain.onnx") == explain(tmp_path / "model.onnx") != []


SCAN_AXES = "Scan is not implemented for other input axes than 0"
"""All that ONNX's own evaluator lacks for these graphs."""


def scans_another_axis(model: onnx.ModelProto) -> bool:
    """Whether a Scan goes over time where it is, behind the batch: moving it to the front costs two copies."""
    nodes = [*all_nodes(model.graph.node), *(node for body in model.functions for node in all_nodes(body.node))]
    axes = [a for node in nodes if node.op_type == "Scan" for a in node.attribute if a.name == "scan_input_axes"]
    return any(axis != 0 for attribute in axes for axis in attribute.ints)


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnxs_own_evaluator_gives_the_numbers(bundle: ee.Bundle, graph: str) -> None:
    """Of a graph whose Scan it lacks, in the form for targets that have no Scan."""
    model, (inputs, outputs) = linked_model(bundle, graph), example(bundle, graph)
    if scans_another_axis(model):
        for form in (model, inline(model)):
            with pytest.raises(RuntimeError, match=SCAN_AXES):
                ReferenceEvaluator(form).run(list(outputs), inputs)
        described = bundle.manifest.graphs[graph]
        module = entry(reference_of(bundle), graph)
        traced = trace(module, described.inputs, described.outputs, bundle.manifest.opset, graph)
        optimize(traced)
        model = link(traced, {} if graph != "window" else bundle.manifest.sizes, "web")
    assert_near(ReferenceEvaluator(model).run(list(outputs), inputs), outputs)


def test_a_build_is_inlined_verified_and_says_so(tmp_path: Path) -> None:
    bundle = ee.build("ss_transformer", output=tmp_path / "bot", inline=True, **{**TINY, "num_layers": 1})
    assert bundle.manifest.inlined
    assert list(bundle.manifest.graphs) == list(GRAPHS)
    assert ee.verify(bundle).passed
    for graph in GRAPHS:
        assert_plain(linked_model(bundle, graph))
    inspection = inspect_model(bundle.file("window/model.onnx"))
    assert (inspection.functions, inspection.metadata["edifice.inlined"]) == ([], "true")


def test_a_strangers_op_is_inlined(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = load_source(SOURCES["leaky"])
    bundle = export_source(source, tmp_path / "bot", Settings(inline=True))
    usual = exported("leaky", tmp_path_factory)
    assert (bundle.manifest.inlined, usual.manifest.inlined) == (True, False)
    assert open_bundle(tmp_path / "bot").manifest == bundle.manifest
    for graph in bundle.manifest.graphs:
        assert linked_model(usual, graph).functions
        assert_plain(linked_model(bundle, graph))
        assert {each["op"] for each in explain(bundle.file(f"{graph}/model.onnx"))} == {"LeakyScan"}


def test_whether_to_inline_is_yes_or_no() -> None:
    with pytest.raises(ee.RequestError, match="inline"):
        Settings(inline="no")  # type: ignore[arg-type]
