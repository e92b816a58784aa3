"""A stranger's modules, none like ours: exported by one command, right at sizes that were never traced, or refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cli_helpers import Capture, done, forge, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_cases import SOURCES, STREAMS, exported, frames_of, largest_error, program
from onnx import helper

import edifice_export as ee
from edifice_export.bundle.manifest import MODULE
from edifice_export.programs.module_program import ModuleProgram
from edifice_export.programs.source import load_source
from edifice_export.specification import Size, Values
from edifice_export.values import draw


@pytest.fixture(scope="module", params=list(SOURCES))
def stranger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ee.Bundle]:
    """The name of a source, and the bundle that the command makes of it."""
    return request.param, exported(request.param, tmp_path_factory)


def test_a_command_exports_it(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = done(capfd, "export", SOURCES["live"], "--seed=3")
    assert "exported exported/Live: Live, opset 20" in outcome.out
    assert (
        "numbers float32 [batch, time, 5], kind int64 [batch, time] -> average float32 [batch, time, 5]" in outcome.out
    )
    assert re.search(r"agrees with the float64 module in \d+ cases, at 1[0-9] different sizes", outcome.words)
    assert "followed as a stream, frame by frame, for 60 frames\n" in outcome.out
    assert "no prefill graph: the module has no extend" in outcome.out
    assert ee.load("exported/Live").bundle.manifest.seed == 3


def test_a_bundle_says_what_it_takes_and_gives(stranger: tuple[str, ee.Bundle]) -> None:
    name, bundle = stranger
    manifest, made = bundle.manifest, load_source(SOURCES[name])
    assert (manifest.program.kind, manifest.program.name) == (MODULE, type(made.module).__name__)
    assert (manifest.program.options, manifest.program.numerics, manifest.reference) == ({}, None, None)
    assert manifest.weights["source"] == "module"
    inputs, outputs = manifest.own_tensors("window")
    assert [spec.dtype for spec in inputs] == [str(each.dtype).removeprefix("torch.") for each in made.args]
    assert all(
        isinstance(size, Size) or size == given
        for spec, example in zip(inputs, made.args, strict=True)
        for size, given in zip(spec.shape, example.shape, strict=True)
    )
    assert ("stream" in manifest.graphs) == (name in STREAMS)
    assert ("prefill" in manifest.graphs) == (name in ("recurrent", "recall"))
    positions = {"leaky": ["every"], "two_and_two": ["every", "whole"], "live": ["every", "every"]}
    assert [spec.position for spec in outputs] == positions.get(name, ["every"])
    kinds = {"token_model": [Values("ids", 5)], "two_and_two": [Values(), Values("ids", 7)]}
    assert [spec.values for spec in inputs] == kinds.get(name, [Values(), Values("ids", 3)][: len(inputs)])
    for graph in manifest.graphs:
        onnx.checker.check_model(bundle.file(manifest.graphs[graph].model), full_check=True)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_plain_onnx_runtime_gives_what_the_module_gives_at_any_size(
    stranger: tuple[str, ee.Bundle], data: st.DataObject
) -> None:
    name, bundle = stranger
    known = _PROGRAMS.setdefault(name, program(name))
    sizes = {symbol: data.draw(st.integers(1, 40), symbol) for symbol in known.example_sizes}
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    inputs = {spec.name: draw(spec, sizes, generator) for spec in bundle.manifest.graphs["window"].inputs}
    session = ort.InferenceSession(bundle.file("window/model.onnx"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in bundle.manifest.graphs["window"].outputs]
    for found, (output, wanted) in zip(session.run(names, inputs), known.run(inputs).items(), strict=True):
        assert largest_error(found, wanted) <= 1e-5, (output, sizes)


_PROGRAMS: dict[str, ModuleProgram] = {}


def test_sizes_that_were_never_traced_are_verified_and_one_frame_is(stranger: tuple[str, ee.Bundle]) -> None:
    name, bundle = stranger
    known = program(name)
    traced = [dict(sizes) for sizes in known.traced_sizes("window")]
    verified = [dict(sizes) for sizes in known.verified_sizes()]
    assert len(verified) == bundle.manifest.parity["sizes"]
    assert sum(sizes not in traced for sizes in verified) > 8
    assert dict.fromkeys(known.example_sizes, 1) in verified
    for symbol in known.example_sizes:
        assert len({sizes[symbol] for sizes in verified}) >= 4


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_gives_what_steps_give(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, known = ee.load(exported(name, tmp_path_factory)), program(name)
    generator = np.random.default_rng(5)
    frames = {spec.name: draw(spec, {}, generator) for spec in frames_of(model, 3, 20)}
    expected = known.run_stream(frames)
    stream = model.stream(batch=3)
    for t in range(20):
        found = stream.step(*(array[:, t] for array in frames.values()))
        found = found if isinstance(found, tuple) else (found,)
        for value, wanted in zip(found, expected.values(), strict=True):
            assert largest_error(value, wanted[:, t]) <= 1e-5
    stream.rewind(4)
    again = stream.step(*(array[:, 16] for array in frames.values()))
    again = again if isinstance(again, tuple) else (again,)
    assert all(largest_error(a, b[:, 16]) <= 1e-5 for a, b in zip(again, expected.values(), strict=True))


@pytest.mark.parametrize("name", ["recurrent", "recall"])
def test_a_history_of_any_length_is_handed_over(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, known = ee.load(exported(name, tmp_path_factory)), program(name)
    width = model.stream().inputs[0].width
    for length in (1, 5, 1500):
        frames = np.random.default_rng(length).standard_normal((2, length, width)).astype(np.float32)
        found = model.stream(batch=2).prefill(frames)
        assert largest_error(found, known.run_stream({"x": frames})["output"][:, -1]) <= 1e-5


def test_a_stream_without_prefill_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    stream = ee.load(exported("live", tmp_path_factory)).stream()
    with pytest.raises(ee.RequestError, match="has no prefill graph, as its module has none; use step"):
        stream.prefill(np.zeros((1, 3, 5), np.float32), np.zeros((1, 3), np.int64))


def test_a_streams_state_is_saved_and_goes_on(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = ee.load(exported("live", tmp_path_factory))
    frame = np.ones((1, 5), np.float32), np.array([2])
    stream = model.stream()
    stream.step(*frame)
    stream.save(tmp_path / "state.safetensors")
    other = model.stream()
    other.load(tmp_path / "state.safetensors")
    for one, two in zip(stream.step(*frame), other.step(*frame), strict=True):
        assert np.array_equal(one, two)
    wrong = ee.load(exported("recurrent", tmp_path_factory)).stream()
    with pytest.raises(ee.RequestError, match="is of another bundle"):
        wrong.load(tmp_path / "state.safetensors")


def test_without_the_module_only_test_data_are_compared(stranger: tuple[str, ee.Bundle]) -> None:
    _, bundle = stranger
    report = ee.verify(bundle, ["cpu"])
    assert report.passed
    assert report.reference == "test data"
    assert report.sizes == report.frames == 0
    assert "is somebody's module; name the code that makes it with --source FILE.py:NAME" in str(report.why_test_data)


def test_with_the_module_all_is_verified(stranger: tuple[str, ee.Bundle], capfd: Capture) -> None:
    name, bundle = stranger
    outcome = done(capfd, "verify", bundle.path, "--source", SOURCES[name], "--provider=cpu")
    parity = bundle.manifest.parity
    assert f"verified at {parity['sizes']} different sizes" in outcome.out
    assert f"ok: {parity['cases']} of {parity['cases']} cases agree with the float64 module" in outcome.words


def test_another_module_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = exported("recurrent", tmp_path_factory)
    message = refused(capfd, "verify", bundle.path, "--source", SOURCES["live"])
    assert "is a Live with weights" in message
    assert "was made of a Recurrent with weights" in message
    made = load_source(SOURCES["recurrent"])
    with torch.no_grad():
        made.module.rate.bias[0] += 1e-7
    with pytest.raises(ee.RequestError, match=r"is a Recurrent with weights .* was made of a Recurrent with weights"):
        ee.verify(bundle, ["cpu"], source=made)


def test_a_source_of_an_architecture_is_refused(any_bundle: ee.Bundle) -> None:
    with pytest.raises(ee.RequestError, match="is of an architecture, which it makes again itself"):
        ee.verify(any_bundle, ["cpu"], source=load_source(SOURCES["live"]))


def altered(bundle: ee.Bundle, folder: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    copied = folder / "bot"
    shutil.copytree(bundle.path, copied)
    path = bundle.manifest.graphs[graph].model
    model = onnx.load(copied / path)
    change(model)
    forge(copied, path, model.SerializeToString())
    return copied


def one_frame_is_off(model: onnx.ModelProto) -> None:
    """Frame 3 of the first output, and no other, by 1e-3."""
    (name,) = (output.name for output in model.graph.output[:1])
    for node in model.graph.node:
        node.output[:] = ["right" if output == name else output for output in node.output]
    index = helper.make_tensor("third", onnx.TensorProto.INT64, [], [3])
    by = helper.make_tensor("by", onnx.TensorProto.FLOAT, [], [1e-3])
    model.graph.initializer.extend(
        [index, by, *(helper.make_tensor(f"number_{n}", onnx.TensorProto.INT64, [], [n]) for n in (0, 1))]
    )
    model.graph.initializer.append(helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]))
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["right"], ["frames_1"], start=1, end=2),
            helper.make_node("Squeeze", ["frames_1", "zero"], ["frames"]),
            helper.make_node("Range", ["number_0", "frames", "number_1"], ["places"]),
            helper.make_node("Equal", ["places", "third"], ["is_third"]),
            helper.make_node("Cast", ["is_third"], ["mark"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["mark", "by"], ["off"]),
            helper.make_node("Unsqueeze", ["off", "one_axis"], ["column"]),
            helper.make_node("Add", ["right", "column"], [name]),
        ]
    )
    model.graph.initializer.append(helper.make_tensor("one_axis", onnx.TensorProto.INT64, [1], [1]))


def test_a_graph_that_is_wrong_at_one_position_is_found(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bot = altered(exported("token_model", tmp_path_factory), tmp_path, "window", one_frame_is_off)
    report = ee.verify(bot, ["cpu"], source=load_source(SOURCES["token_model"]))
    wrong = [case for case in report.cases if not case.passed]
    lengths = {int(case.sizes.rpartition(" ")[2]) for case in wrong}
    assert min(lengths) > 3
    assert {case.passed for case in report.cases} == {True, False}


def test_a_node_that_departs_is_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def weaker(model: onnx.ModelProto) -> None:
        (weight,) = (each for each in model.graph.initializer if each.name == "norm.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))

    bot = altered(exported("token_model", tmp_path_factory), tmp_path, "window", weaker)
    report = ee.verify(bot, ["cpu"], source=load_source(SOURCES["token_model"]))
    assert not report.passed
    assert report.departure is not None
    assert report.departure.node == "norm/layer_norm"
    assert report.float32_error is not None
    assert report.float32_error < report.worst.limit


def test_a_wrong_state_is_found(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def late(model: onnx.ModelProto) -> None:
        (rate,) = (each for each in model.graph.initializer if each.name == "rate.bias")
        rate.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(rate) + np.float32(1e-3), rate.name))

    bot = altered(exported("recurrent", tmp_path_factory), tmp_path, "stream", late)
    report = ee.verify(bot, ["cpu"], source=load_source(SOURCES["recurrent"]))
    assert not report.passed
    assert {case.graph for case in report.cases if not case.passed} == {"stream"}
    assert report.departure is not None


def test_the_example_of_the_docs(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/export.md").read_text()
    code, commands = re.findall(r"```(?:python|sh)\n(.*?)```", page, re.DOTALL)[:2]
    Path("mine.py").write_text(code)
    np.savez("ids.npz", input_ids=np.array([[0, 4, 2]]))
    for command in commands.strip().splitlines():
        done(capfd, *command.split()[1:])
    assert np.load("logits.npz")["logits"].shape == (1, 3, 5)


def test_a_source_of_other_sizes_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = load_source(SOURCES["token_model"])
    other = ee.Source(made.module, made.args, {"input_ids": {0: "batch"}}, output_names=["logits"])
    with pytest.raises(
        ee.RequestError, match=r"takes input_ids int64 \[batch, 9\] .* takes input_ids int64 \[batch, seq"
    ):
        ee.verify(exported("token_model", tmp_path_factory), ["cpu"], source=other)
