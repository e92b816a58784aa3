"""A stranger's modules, none like ours: exported by one command, right at sizes that were never traced, or refused."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cli_helpers import Capture, done, edit_manifest, error_of, forge, refused
from cli_helpers import cli as run_cli
from conftest import shared_place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_export.bundle.manifest import MODULE
from edifice_export.programs.module_program import ModuleProgram
from edifice_export.programs.source import load_source
from edifice_export.specification import InputSpec, Size, Values, shape_of
from edifice_export.values import draw
from edifice_reference import ops

STRANGERS = Path(__file__).parent / "strangers"
SOURCES = {
    name: f"{STRANGERS}/{file}.py:{name}"
    for file, names in {
        "models": ("token_model", "both_ways", "two_and_two", "live", "recurrent"),
        "leaky_scan": ("leaky",),
    }.items()
    for name in names
}
STREAMS = ("live", "recurrent")


@pytest.fixture(scope="module", params=list(SOURCES))
def stranger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ee.Bundle]:
    """The name of a source, and the bundle that the command makes of it."""
    return request.param, exported(request.param, tmp_path_factory)


def exported(name: str, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The bundle of a source, made once for all tests."""
    with shared_place(f"module_{name}", tmp_path_factory) as place:
        if not place.exists():
            made = load_source(SOURCES[name])
            ee.export(
                made.module,
                made.args,
                dynamic_shapes=made.dynamic_shapes,
                output_names=made.output_names,
                output=place,
            )
        return open_bundle(place)


def program(name: str) -> ModuleProgram:
    return ModuleProgram(load_source(SOURCES[name]))


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the largest number."""
    assert found.shape == wanted.shape
    wanted = wanted.astype(np.float64)
    return float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))


# What is exported


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
    assert ("prefill" in manifest.graphs) == (name == "recurrent")
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
    sizes = {symbol: data.draw(st.integers(1, 40), symbol) for symbol in bundle.manifest.sizes}
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
    assert dict.fromkeys(known.sizes, 1) in verified
    for symbol in known.sizes:
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


def frames_of(model: ee.Model, batch: int, length: int) -> list[InputSpec]:
    return [
        InputSpec(spec.name, spec.dtype, shape_of(batch, length, *spec.shape[1:]), spec.values)
        for spec in model.bundle.manifest.own_tensors("stream")[0]
    ]


def test_a_history_of_any_length_is_handed_over(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, known = ee.load(exported("recurrent", tmp_path_factory)), program("recurrent")
    for length in (1, 5, 1500):
        frames = np.random.default_rng(length).standard_normal((2, length, 4)).astype(np.float32)
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


# How it is verified


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


# What is refused


class Recurs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
        return h


FREE = ({0: "batch", 1: "time"},)


def test_a_loop_over_time_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError) as error:
        ee.export(Recurs(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    message = str(error.value)
    assert f"{__file__}:" in message
    assert "for t in range(x.shape[1]):" in message
    assert "ops.linear_scan" in message
    assert not list(tmp_path.iterdir())


class Holds(nn.Module):
    """Torch's own operators for control flow."""

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan
        from torch._higher_order_ops.while_loop import while_loop

        def combine(h: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
            after = 0.9 * h + frame
            return after, after.clone()

        _, y = scan(combine, x[:, 0] * 0, x, dim=1)
        _, total = while_loop(
            lambda turn, _: turn < x.shape[1],
            lambda turn, h: (turn + 1, h * 0.9 + x[:, 0]),
            (torch.tensor(0), y[:, -1]),
        )
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y + total[:, None],))


def test_torchs_own_operators_keep_their_length_free(tmp_path: Path) -> None:
    bundle = ee.export(Holds(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["sizes"] > 8


class Refuses(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: {"y": x}, "Refuses gives a dict; return a tensor or a flat tuple"),
        (lambda x: (x, None), "Refuses gives a tuple; return a tensor or a flat tuple"),
        (lambda x: x.reshape(3, 3), "Refuses fails on its example: RuntimeError: shape"),
        (lambda x: torch.cumsum(x.half(), 1), "gives output as float16, and torch's exporter makes float32 of it"),
        (lambda x: x.double() * 2, "the output output is float64; give one of float32"),
        (lambda x: x / 0, r"Refuses gives -?inf in output at \[0, 0, 0\] of an example; outputs are finite"),
    ],
)
def test_what_no_bundle_holds_is_refused(forward: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ee.ExportError, match=message):
        ee.export(Refuses(forward), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert not list(tmp_path.iterdir())


def test_inner_values_give_way_to_declared_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, linear: Tensor, add: Tensor) -> Tensor:
            return torch.relu(self.relu(self.linear(linear)) + add)

    args, free = (torch.randn(2, 4), torch.randn(2, 4)), ({0: "batch"}, {0: "batch"})
    for names in (None, ["relu/linear"], ["relu"], ["linear_1"]):
        bundle = ee.export(Two(), args, dynamic_shapes=free, output_names=names, output=tmp_path / "bot")
        onnx.checker.check_model(bundle.file("window/model.onnx"), full_check=True)


def test_a_name_is_an_input_or_an_output(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match="inputs and outputs are called x, x; give each a name of its own"):
        ee.export(Refuses(lambda x: x * 2), (torch.randn(2, 5),), output_names=["x"], output=tmp_path / "bot")


class Steps(nn.Module):
    """A running sum, of which parts can be put otherwise."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        vars(self).update(changed)

    def initial_state(self, batch: int) -> Any:
        return {"sum": torch.zeros(batch, 4)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        total = state["sum"] + x
        return total, {"sum": total}

    def extend(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        y = torch.cumsum(x, 1) + state["sum"][:, None]
        return y, {"sum": y[:, -1]}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


def test_a_running_sum_has_all_graphs(tmp_path: Path) -> None:
    bundle = ee.export(Steps(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]


def test_a_state_may_be_given_by_name(tmp_path: Path) -> None:
    def step(*frame: Tensor, state: dict[str, Tensor]) -> Any:
        return frame[0] + state["sum"], {"sum": frame[0] + state["sum"]}

    bundle = ee.export(Steps(step=step), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["frames"] == 50


WRONG_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "no dict": ({"initial_state": lambda batch: torch.zeros(batch, 4)}, "initial_state gives no dict of tensors"),
    "no batch": ({"initial_state": lambda _: {"sum": torch.zeros(4)}}, "gives sum as float32 .4.; a state is"),
    "a name": ({"initial_state": lambda b: {"\0": torch.zeros(b, 4)}}, "give names of 1 to 98 printable letters"),
    "below zero": (
        {"initial_state": lambda b: {"sum": -torch.ones(b, 4, dtype=torch.int64)}},
        "gives sum negative integers; let it start from 0 or above",
    ),
    "half": ({"initial_state": lambda b: {"sum": torch.zeros(b, 4).half()}}, "a state is float32, int64 or int32"),
    "unlike": (
        {"initial_state": lambda b: {"sum": torch.arange(b).float()[:, None].repeat(1, 4)}},
        "another sum than initial_state.1.; entries start alike",
    ),
    "fails": ({"step": lambda x, _: x.reshape(3, 7)}, "step fails on the first frame of the example: RuntimeError"),
    "no state": ({"step": lambda x, _: x}, "step fails on the first frame|step should give a tensor"),
    "grows": (
        {"step": lambda x, state: (x, {"sum": torch.cat([state["sum"], x], 1)})},
        r"makes of the state sum \[2, 4\] one of \[2, 8\] float32; a state keeps its shape",
    ),
    "extends wrong": (
        {"extend": lambda x, state: (torch.cumsum(x, 1), {"sum": state["sum"] + x.sum(1)})},
        "Steps was not written: .* prefill",
    ),
}


@pytest.mark.parametrize("name", list(WRONG_STEPS))
def test_steps_that_no_stream_can_take_are_refused(name: str, tmp_path: Path) -> None:
    changed, message = WRONG_STEPS[name]
    with pytest.raises(ee.ExportError, match=message):
        ee.export(Steps(**changed), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert not list(tmp_path.iterdir())


def test_steps_need_free_frames(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match=r"so that its inputs are \[batch, frames, ...\], both free"):
        ee.export(Steps(), (torch.randn(2, 5, 4),), dynamic_shapes=({0: "batch"},), output=tmp_path / "bot")


# What people have


class Masked(nn.Module):
    """Causal attention with padding, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.triu(torch.full((length, length), float("-inf")), 1)
        padding = torch.where(attention_mask == 0, float("-inf"), 0.0)
        return self.attention(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0]


class Patches(nn.Module):
    """Patches of an image, in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        y, _ = ops.linear_scan(x, functional.logsigmoid(x))
        return y


class Block(nn.Module):
    """A Mamba block, as in the paper."""

    def __init__(self, width: int = 16, state: int = 4) -> None:
        super().__init__()
        self.state = state
        self.enter = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.select = nn.Linear(width, 1 + 2 * state)
        self.step_size = nn.Linear(1, width)
        self.log_rates = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))
        self.leave = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.enter(hidden_states).chunk(2, dim=-1)
        x = functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        size, b, c = self.select(x).split([1, self.state, self.state], dim=-1)
        delta = functional.softplus(self.step_size(size))
        y, _ = ops.selective_scan(delta * x, delta, -torch.exp(self.log_rates), b, c)
        return self.leave((y + self.skip * x) * functional.silu(z))


class Mamba(Block):
    """The same frame by frame: the ops take one frame, or several, from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.width = self.skip.numel()

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"conv": torch.zeros(batch, 3, self.width), "ssm": torch.zeros(batch, self.state, self.width)}

    def step(self, hidden_states: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, z = self.enter(hidden_states).chunk(2, dim=-1)
        x, conv = ops.causal_conv1d(x, self.conv.weight, self.conv.bias, self.width, state["conv"])
        x = functional.silu(x)
        size, b, c = self.select(x).split([1, self.state, self.state], dim=-1)
        delta = functional.softplus(self.step_size(size))
        y, ssm = ops.selective_scan(delta * x, delta, -torch.exp(self.log_rates), b, c, state["ssm"])
        return self.leave((y + self.skip * x) * functional.silu(z)), {"conv": conv, "ssm": ssm}

    extend = step


@pytest.mark.parametrize("target", ["portable", "web"])
def test_a_mamba_goes_frame_by_frame(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Mamba().eval()
    bundle = ee.export(module, (torch.randn(2, 20, 16),), dynamic_shapes=FREE, target=target, output=tmp_path / "bot")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]
    nodes = {
        graph: [node.op_type for node in onnx.load(bundle.file(entry.model)).graph.node]
        for graph, entry in bundle.manifest.graphs.items()
    }
    assert [node for node in nodes["stream"] if "_" in node] == ["CausalConv1d_frame_4to2", "SelectiveScan_frame_6to2"]
    assert {node.partition("_")[0] for node in nodes["prefill"]} > {"CausalConv1d", "SelectiveScan"}
    x = torch.randn(1, 50, 16)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double()).numpy()
    stream = ee.load(bundle).stream()
    assert largest_error(stream.prefill(x[:, :33].numpy()), expected[:, 32]) <= 1e-5
    for t in range(33, 50):
        assert largest_error(stream.step(x[:, t].numpy()), expected[:, t]) <= 1e-5


class Counts(nn.Module):
    """Changes a buffer whenever it is called, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += 1
        return x * 2


IMAGE = {0: "batch", 2: "height", 3: "width"}
PEOPLES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Any]] = {
    "masked": (Masked, (torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.int64)), (FREE[0],) * 2),
    "patches": (Patches, (torch.randn(2, 3, 16, 12),), (IMAGE,)),
    "mamba": (Block, (torch.randn(2, 60, 16),), FREE),
    "compiled": (lambda: torch.compile(Block()), (torch.randn(2, 6, 16),), FREE),
    "parallel": (lambda: nn.DataParallel(Block()), (torch.randn(2, 6, 16),), FREE),
    "overflows on larger numbers": (lambda: Refuses(torch.exp), (torch.randn(2, 6, 4),), FREE),
    "every second": (lambda: Refuses(lambda x: x[:, ::2]), (torch.randn(2, 6, 4),), FREE),
    "one axis": (lambda: Refuses(lambda x: torch.cumsum(x, 0)), (torch.randn(6, 4),), ({0: "time"},)),
    "nothing free": (Block, (torch.randn(2, 6, 16),), None),
    "constant": (lambda: Refuses(lambda x: (x * 2, torch.ones(3))), (torch.randn(2, 6),), FREE),
    "input given back": (lambda: Refuses(lambda x: (x, x)), (torch.randn(2, 6),), FREE),
    "changes a buffer": (Counts, (torch.randn(2, 6),), FREE),
}


@pytest.mark.parametrize("name", list(PEOPLES))
def test_what_people_have_is_exported(name: str, tmp_path: Path) -> None:
    make, args, free = PEOPLES[name]
    torch.manual_seed(0)
    module = make()
    before = copy.deepcopy(module.state_dict()), [value.clone() for value in args]
    bundle = ee.export(module, args, dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.parity["sizes"] >= (8 if free else 1)
    assert ee.verify(bundle, ["cpu"], source=ee.Source(module, args, free)).passed
    assert all(torch.equal(value, before[0][key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, kept) for value, kept in zip(args, before[1], strict=True))


STABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "decays near 1": lambda x: functional.logsigmoid(x + 12),
    "decays near 0": lambda x: functional.logsigmoid(50 * x - 60),
    "differences of sums of decays": lambda x: functional.logsigmoid(x).cumsum(1),
    "logaddexp": lambda x: torch.logaddexp(20 * x, -5 * x),
    "expm1": lambda x: torch.expm1(1e-6 * x),
    "log1p": lambda x: torch.log1p(1e-6 * x.abs()),
    "log1p of more": lambda x: torch.log1p(3 * x.abs()),
}


@pytest.mark.parametrize("name", list(STABLE))
def test_what_operators_are_there_for_is_kept(name: str, tmp_path: Path) -> None:
    bundle = ee.export(Refuses(STABLE[name]), (torch.randn(2, 6, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["max_rel"] < 2e-6


@pytest.mark.parametrize("forward", [lambda x: torch.special.erfc(x.abs() + 4), lambda x: torch.sigmoid(3 * x - 20)])
def test_small_outputs_are_held_to_their_own_size(forward: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="was not written"):
        ee.export(Refuses(forward), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")


def test_parametrizations_are_those_of_inference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), torch.randn(2, 5, 4)
    bundle = ee.export(module, (x,), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert module.training
    with torch.no_grad():
        expected = copy.deepcopy(module).double().eval()(x.double()).numpy()
    assert largest_error(ee.load(bundle)(x.numpy()), expected) < 1e-6


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, r"decides by the values that it is given, in .*test_modules.py:\d+: `"),
        (lambda x: x * float(x.max()), "decides by the values that it is given"),
        (lambda x: x.cumprod(1), "torch's exporter has no ONNX form of"),
        (lambda x: x.median(), "torch's exporter has no ONNX form of aten.median"),
    ],
)
def test_what_no_graph_can_say_is_told_in_our_words(
    forward: Callable[[Tensor], Tensor], message: str, tmp_path: Path, capfd: Capture
) -> None:
    with pytest.raises(ee.CheckError, match=message):
        ee.export(Refuses(forward), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["../../victim", "/victim", "a/b"])
def test_the_name_of_a_state_is_no_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim.pb").write_text("precious")
    steps = Steps(
        initial_state=lambda batch: {name: torch.arange(4.0).repeat(batch, 1)},
        step=lambda x, state: (state[name] + x, {name: state[name] + x}),
        extend=None,
    )
    bundle = ee.export(steps, (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert [path.name for path in tmp_path.iterdir() if path != bundle.path] == ["victim.pb"]
    assert (tmp_path / "victim.pb").read_text() == "precious"
    assert np.allclose(ee.load(bundle).stream().step(np.zeros(4, np.float32)), [0, 1, 2, 3])


def test_a_source_of_other_sizes_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = load_source(SOURCES["token_model"])
    other = ee.Source(made.module, made.args, {"input_ids": {0: "batch"}}, output_names=["logits"])
    with pytest.raises(
        ee.RequestError, match=r"takes input_ids int64 \[batch, 9\] .* takes input_ids int64 \[batch, seq"
    ):
        ee.verify(exported("token_model", tmp_path_factory), ["cpu"], source=other)


def test_a_size_that_values_decide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="of a size that depends on the values that it is given"):
        ee.export(Refuses(lambda x: x[x > 0]), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")


def test_what_differs_from_call_to_call_is_named(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="the first node that departs is rand_like"):
        ee.export(Refuses(lambda x: x + torch.rand_like(x)), (torch.randn(2, 6),), output=tmp_path / "bot")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match="is a TorchScript module"):
        ee.export(torch.jit.script(nn.Linear(4, 4)), (torch.randn(2, 4),), output=tmp_path / "bot")


# What weights there are


class Tied(nn.Module):
    """A weight under two names, weight norm, a buffer, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.dense = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dense(self.embedding(ids)) * self.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_right(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Tied().to(dtype)
    module.dense.register_forward_hook(lambda _module, _given, found: found * 2)
    before, mode = copy.deepcopy(module.state_dict()), module.training
    bundle = ee.export(module, (torch.randint(7, (2, 5)),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert module.training == mode
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {value.dtype for value in module.parameters()} == {dtype}
    ids = torch.randint(7, (3, 11))
    with torch.no_grad():
        expected = copy.deepcopy(module).double().eval()(ids).numpy()
    assert largest_error(ee.load(bundle)(ids.numpy()), expected) < (1e-6 if dtype == torch.float32 else 2e-2)
    exact = copy.deepcopy(module).float()
    if dtype != torch.float32:
        # Of weight norm, what the values make in half precision is what the module computes with.
        with torch.no_grad():
            dense = module.dense.weight.float()
        wanted = exact.head.weight @ (dense @ exact.embedding.weight.T + exact.dense.bias[:, None])
        assert wanted.shape == (7, 7)


# How it is run


def test_run_takes_and_gives_tensors_by_name(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = exported("two_and_two", tmp_path_factory)
    signal = np.random.default_rng(0).standard_normal((3, 9, 5)).astype(np.float32)
    kinds = np.random.default_rng(0).integers(0, 7, (3, 9)).astype(np.int32)
    np.savez("in.npz", signal=signal, kinds=kinds, more=np.zeros(3))
    outcome = done(capfd, "run", bundle.path, "--input=in.npz", "--output=out.npz")
    assert "output_0 [3, 9], output_1 [3, 8]" in outcome.words
    with np.load("out.npz") as found:
        for name, wanted in ee.load(bundle).run({"signal": signal, "kinds": kinds}).items():
            assert np.array_equal(found[name], wanted)
    for arguments, message in (
        (("--input=in.npz", "--output=out.npy"), "this bundle gives output_0, output_1; name a .npz file"),
        (("--input=in.npy", "--output=new.npz"), "in.npy: there is no such file"),
        (("--input=in.npz", "--output=in.npz"), "is the input"),
        (("--input=in.npz", "--output=new.npz", "--stride=2"), "is for the windows of an architecture"),
        (("--input=in.npz", "--output=new.npz", "--stream"), "has no step"),
    ):
        assert message in refused(capfd, "run", bundle.path, *arguments)
    np.savez("part.npz", signal=signal)
    assert "holds signal, and no kinds" in refused(capfd, "run", bundle.path, "--input=part.npz", "--output=new.npz")


def test_run_streams_tensors(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = exported("live", tmp_path_factory)
    model = ee.load(bundle)
    frames = {spec.name: draw(spec, {}, np.random.default_rng(0)) for spec in frames_of(model, 2, 12)}
    np.savez("in.npz", **frames)
    assert "streamed 12 frames" in done(capfd, "run", bundle.path, "--input=in.npz", "--output=o.npz", "--stream").out
    with np.load("o.npz") as found:
        for name, wanted in program("live").run_stream(frames).items():
            assert largest_error(found[name], wanted) <= 1e-5
    frames["kind"][0, 7] = 3
    np.savez("in.npz", **frames)
    outcome = run_cli(capfd, "run", bundle.path, "--input=in.npz", "--output=new.npz", "--stream")
    assert "in.npz, frame 7: kind: holds 3 at [0]; there are 0 to 2, give those" in error_of(outcome)


@pytest.mark.parametrize("name", ["both_ways", "live", "recurrent"])
def test_it_is_measured(name: str, tmp_path_factory: pytest.TempPathFactory, capfd: Capture) -> None:
    bundle = exported(name, tmp_path_factory)
    outcome = done(capfd, "bench", bundle.path, "--rounds=2", "--threads=1")
    assert outcome.out.startswith(f"{bundle.manifest.program.name}, window of")
    assert "outputs not compared: this is somebody's module" in outcome.out
    report = ee.bench(bundle, rounds=2, threads=[1], batch=[1, 3])
    measured = {(result.graph, result.batch) for result in report.results}
    assert measured >= {(graph, batch) for graph in bundle.manifest.graphs for batch in (1, 3) if graph != "prefill"}
    with pytest.raises(ee.RequestError, match="against eager: is for architectures"):
        ee.bench(bundle, against=["eager"])
    if name == "both_ways":
        with pytest.raises(ee.RequestError, match="length: this bundle has no frames"):
            ee.bench(bundle, length=[7])


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"signal": (2, 4, 5)}, "takes signal float32 .*; got signal"),
        ({"signal": (2, 4, 5), "kinds": (2, 5)}, "kinds: time is 5, and 4 in what was given before"),
        (
            {"signal": (2, 4, 6), "kinds": (2, 4)},
            r"signal: expected signal float32 \[batch, time, 5\] or \[time, 5\], got shape \[2, 4, 6",
        ),
        ({"signal": (2, 4, 5), "kinds": (2, 4), "more": (1,)}, "got signal, kinds, more"),
        ({"signal": (2, 0, 5), "kinds": (2, 0)}, "which holds nothing"),
    ],
)
def test_other_inputs_are_refused(
    given_: dict[str, tuple[int, ...]], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ee.load(exported("two_and_two", tmp_path_factory))
    dtypes = {"kinds": np.int32}
    with pytest.raises(ee.RequestError, match=message):
        model.run({name: np.zeros(shape, dtypes.get(name, np.float32)) for name, shape in given_.items()})


def test_a_single_entry_goes_without_its_axis(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = ee.load(exported("two_and_two", tmp_path_factory))
    signal, kinds = np.ones((3, 5), np.float32), np.ones(3, np.int32)
    single, batch = model(signal, kinds), model(signal[None], kinds=kinds[None])
    assert isinstance(single, tuple)
    assert all(np.array_equal(one, several[0]) for one, several in zip(single, batch, strict=True))
    with pytest.raises(ee.RequestError, match="some inputs have a batch and others not"):
        model(signal, kinds[None])
    with pytest.raises(ee.RequestError, match="each once"):
        model(signal, kinds, kinds=kinds)


class Places(nn.Module):
    """A table of positions that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x + self.place(torch.arange(x.shape[1])))


def test_a_size_has_the_limit_that_was_declared(tmp_path: Path) -> None:
    free = ({0: "batch", 1: torch.export.Dim("time", max=16)},)
    bundle = ee.export(Places(), (torch.randn(2, 5, 4),), dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.graphs["window"].limits == {"time": (1, 16)}
    model = ee.load(bundle)
    assert model(np.zeros((1, 16, 4), np.float32)).shape == (1, 16, 4)
    with pytest.raises(ee.RequestError, match="x: time is 17, and this model takes at most 16"):
        model(np.zeros((1, 17, 4), np.float32))
    edit_manifest(bundle.path, ("graphs", "window", "limits"), {"time": [1, 99]})
    with pytest.raises(ee.CheckError, match=r"of edifice.limits the manifest says"):
        ee.load(bundle.path)


def test_ops_keep_their_lowerings_whatever_an_axis_is_called(tmp_path: Path) -> None:
    class Scans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = ops.linear_scan(x, -functional.softplus(self.dense(x)))
            return y[:, -1]

    def nodes(name: str) -> list[str]:
        torch.manual_seed(0)
        free = ({0: "batch", 1: name},)
        bundle = ee.export(Scans(), (torch.randn(2, 60, 64),), dynamic_shapes=free, output=tmp_path / name)
        return [node.op_type for node in onnx.load(bundle.file("window/model.onnx")).graph.node]

    assert nodes("sequence") == nodes("seq_len")


def test_a_module_without_parameters_of_four_sizes(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.relu(y)

    free = ({0: "a", 1: "b"}, {0: "c", 1: "d"})
    bundle = ee.export(Both(), (torch.randn(2, 3), torch.randn(5, 7)), dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.sizes == {"a": 2, "b": 3, "c": 5, "d": 7}
