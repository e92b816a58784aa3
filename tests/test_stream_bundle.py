"""Bundles with a stream: a program that knows nothing but their files runs them, and the command line does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cli_helpers import REMOVED, Capture, cli, done, edit_manifest, error_of, forge, refused, unchanged
from conftest import ANY, GOLDEN, TINY, any_architecture
from golden_cases import SMALL, load_case
from onnx import numpy_helper
from stream_helpers import HIDDEN, WIDTH, WINDOW, agrees, contents, expected, frames, reference, same, steps

import edifice_export as ee
from edifice_export.verification.report import describe_gap

GRAPHS = {"window": ["window"], "stream": ["stream", "prefill"], "both": ["window", "stream", "prefill"]}


class Plain:
    """A bundle as any program sees it: its manifest, its tensors and ONNX Runtime, and nothing of this package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.states = self.manifest["states"]

    def tensor(self, path: str) -> np.ndarray:
        return numpy_helper.to_array(onnx.load_tensor(self.folder / path))

    def session(self, graph: str) -> ort.InferenceSession:
        path = self.folder / self.manifest["graphs"][graph]["model"]
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def stream(self, sequence: np.ndarray) -> np.ndarray:
        """The output at every frame of [batch, sequence, embed_dim], from the initial state."""
        session, batch, outputs = self.session("stream"), sequence.shape[0], []
        past = {}
        for state in self.states:
            shape = [batch if size == "batch" else size for size in state["shape"]]
            initial = state["initial"]
            value = self.tensor(initial) if isinstance(initial, str) else np.array(initial)
            past[f"past.{state['name']}"] = np.ascontiguousarray(np.broadcast_to(value, shape).astype(state["dtype"]))
        names = ["output", *(f"present.{state['name']}" for state in self.states)]
        for t in range(sequence.shape[1]):
            output, *present = session.run(names, {"frame": sequence[:, t], **past})
            past = dict(zip(past, present, strict=True))
            outputs.append(output)
        return np.stack(outputs, axis=1)


@pytest.fixture(scope="module", params=SMALL)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle from Edifice's own weights. H3's numerics are standard: Edifice's have no stream."""
    name = request.param.removesuffix("_small")
    folder = tmp_path_factory.mktemp("golden") / name
    numerics = "standard" if name == "h3" else "edifice"
    ee.build(name, weights=GOLDEN / f"{name}_small.safetensors", numerics=numerics, graph="stream", output=folder)
    return folder


def test_a_plain_loop_gives_edifices_output_at_every_frame(golden: Path) -> None:
    """Edifice's file holds the output of the whole window; what it gives for shorter ones its float64 model says."""
    edifice, example = load_case(GOLDEN / f"{golden.name}_small.safetensors")
    sequence = example["state_sequence"]
    plain, exact = Plain(golden), edifice.double()
    assert plain.manifest["program"]["numerics"] == ("standard" if golden.name == "h3" else "edifice")
    with torch.no_grad():
        prefixes = [exact(sequence[:, :length].double()) for length in range(1, sequence.shape[1] + 1)]
    wanted = torch.stack(prefixes, dim=1).numpy()
    assert sequence.shape[1] == plain.manifest["sizes"]["sequence"]
    for entries in (slice(None), slice(0, 1), slice(1, 2)):
        found = plain.stream(sequence[entries].numpy())
        assert np.abs(found - wanted[entries]).max() <= 1e-5
        assert np.abs(found[:, -1] - example["output"][entries].numpy()).max() <= 1e-5


def test_a_plain_loop_goes_on_beyond_the_window(golden: Path) -> None:
    bundle = ee.load(golden).bundle
    width = bundle.manifest.program.options["embed_dim"]
    sequence = np.random.default_rng(0).standard_normal((3, 40, width)).astype(np.float32)
    wanted = expected(bundle, sequence)
    assert agrees(Plain(golden).stream(sequence), wanted)
    assert agrees(steps(ee.load(golden).stream(3), sequence), wanted)


# What the manifest says


def test_the_manifest_lists_every_state_of_the_reference(bundle: ee.Bundle) -> None:
    listed = Plain(bundle.path).states
    initial = reference(bundle).initial_state(1)
    assert [state["name"] for state in listed] == list(initial)
    for state in listed:
        value = initial[state["name"]]
        assert state["dtype"] == ("int64" if state["name"] == "0.position" else "float32")
        assert state["shape"] == ["batch", *value.shape[1:]]
        assert state["initial"] == 0
        assert not value.any()


@pytest.mark.parametrize("graph", ["stream", "prefill"])
def test_every_state_is_an_input_and_an_output(bundle: ee.Bundle, graph: str) -> None:
    plain = Plain(bundle.path)
    entry, session = plain.manifest["graphs"][graph], plain.session(graph)
    first = ("frame", ["batch", WIDTH]) if graph == "stream" else ("state_sequence", ["batch", "sequence", WIDTH])
    numbers, counts = {"kind": "normal", "below": None}, {"kind": "integers", "below": 16}
    for described, found, before, prefix in (
        (entry["inputs"], session.get_inputs(), (*first, {"values": numbers}), "past"),
        (entry["outputs"], session.get_outputs(), ("output", ["batch", HIDDEN], {"position": "last"}), "present"),
    ):
        carried = []
        for state in plain.states:
            held = {"values": counts if state["dtype"] == "int64" else numbers}
            what = held if prefix == "past" else {"position": "whole"}
            carried.append(
                {"name": f"{prefix}.{state['name']}", "dtype": state["dtype"], "shape": state["shape"], **what}
            )
        assert described == [{"name": before[0], "dtype": "float32", "shape": before[1], **before[2]}, *carried]
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        assert [(each.name, each.type, each.shape) for each in found] == [
            (each["name"], types[each["dtype"]], each["shape"]) for each in described
        ]


@pytest.mark.parametrize("graph", GRAPHS["both"])
def test_a_lone_model_says_what_graph_it_is_and_which_states_it_has(bundle: ee.Bundle, graph: str) -> None:
    said = {entry.key: entry.value for entry in onnx.load(bundle.file(f"{graph}/model.onnx")).metadata_props}
    assert said["edifice.graph"] == graph
    assert json.loads(said["edifice.program"])["name"] == bundle.manifest.program.name
    assert json.loads(said["edifice.sizes"]) == {"batch": 1, "sequence": WINDOW}
    assert json.loads(said["edifice.states"]) == ([] if graph == "window" else Plain(bundle.path).states)
    limited = graph == "window" and bundle.manifest.program.name == "hyena"
    assert json.loads(said["edifice.limits"]) == ({"sequence": [1, WINDOW]} if limited else {})


@pytest.mark.parametrize("graph", GRAPHS["both"])
def test_test_data_replays(bundle: ee.Bundle, graph: str) -> None:
    """Outputs and present states, in plain ONNX Runtime."""
    plain = Plain(bundle.path)
    entry, session = plain.manifest["graphs"][graph], plain.session(graph)
    assert len(entry["test_data"]) == {"window": 2, "stream": 3, "prefill": 2}[graph]
    for folder in entry["test_data"]:
        given, wanted = (
            {each["name"]: plain.tensor(f"{folder}/{kind}_{index}.pb") for index, each in enumerate(entry[f"{kind}s"])}
            for kind in ("input", "output")
        )
        found = dict(zip(wanted, session.run(list(wanted), given), strict=True))
        assert all(agrees(found[name], wanted[name]) for name in wanted)
        assert all(onnx.load_tensor(bundle.file(f"{folder}/input_{i}.pb")).name == name for i, name in enumerate(given))
        assert np.abs(wanted["output"]).max() > 0.1


@pytest.mark.parametrize("graph", ["stream", "prefill"])
def test_test_data_is_the_float64_references_and_each_set_goes_on_from_the_last(bundle: ee.Bundle, graph: str) -> None:
    exact = reference(bundle)
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in exact.initial_state(2).items()
    }
    lengths = []
    for _, inputs, outputs in bundle.test_data(graph):
        sequence = inputs.pop("frame" if graph == "stream" else "state_sequence")
        lengths.append(sequence.shape[1] if graph == "prefill" else 1)
        assert {name: value.tobytes() for name, value in inputs.items()} == {
            f"past.{name}": value.numpy().tobytes() for name, value in state.items()
        }
        given = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
        with torch.no_grad():
            output, after = exact.extend(torch.tensor(sequence).double(), given)
        last = output if graph == "stream" else output[:, -1]
        np.testing.assert_array_equal(outputs.pop("output"), last.float().numpy())
        state = {name: value.float() if value.is_floating_point() else value for name, value in after.items()}
        for name, value in state.items():
            np.testing.assert_array_equal(outputs[f"present.{name}"], value.numpy())
    assert lengths == ([1, 1, 1] if graph == "stream" else [WINDOW + 2, 4])


def test_the_test_sequence_is_long_and_replays(bundle: ee.Bundle) -> None:
    plain = Plain(bundle.path)
    entry = plain.manifest["graphs"]["stream"]["test_sequence"]
    assert [graph.get("test_sequence") for graph in plain.manifest["graphs"].values()].count(None) == 2
    sequence, wanted = (plain.tensor(f"{entry['folder']}/{name}_0.pb") for name in ("input", "output"))
    assert sequence.shape[1] == wanted.shape[1] >= 2.5 * WINDOW
    assert agrees(plain.stream(sequence), wanted)
    np.testing.assert_array_equal(wanted, expected(bundle, sequence).astype(np.float32))
    for specs, array in ((entry["inputs"], sequence), (entry["outputs"], wanted)):
        (spec,) = specs
        assert spec["shape"] == ["batch", "sequence", array.shape[2]]
        assert spec["dtype"] == str(array.dtype)


# Meta tokens that go through every block: initial states that no number stands for


def test_initial_states_are_files_where_no_number_stands_for_them(primed: ee.Bundle) -> None:
    plain, initial = Plain(primed.path), reference(primed).initial_state(1)
    for index, state in enumerate(plain.states):
        name, kind = state["name"], state["name"].partition(".")[2]
        if kind not in ("ssm", "conv"):
            assert state["initial"] == 0
            continue
        assert state["initial"] == f"stream/initial/{index}.pb"
        value = plain.tensor(state["initial"])
        assert (list(value.shape), value.dtype) == ([1, *state["shape"][1:]], np.dtype(np.float32))
        assert np.abs(value).max() > 1e-4
        np.testing.assert_array_equal(value, initial[name].float().detach().numpy())
        assert state["initial"] in plain.manifest["files"]


def test_a_stream_starts_from_the_files(primed: ee.Bundle) -> None:
    sequence = frames(3, 3 * WINDOW)
    wanted = expected(primed, sequence)
    assert agrees(Plain(primed.path).stream(sequence), wanted)
    stream = ee.load(primed).stream(3)
    first = steps(stream, sequence)
    assert agrees(first, wanted)
    stream.reset([1])
    again = steps(stream, sequence)
    np.testing.assert_array_equal(again[1], first[1])
    assert not np.allclose(again[0, :3], first[0, :3], atol=1e-4)
    stream.reset()
    assert same(contents(stream), contents(ee.load(primed).stream(3)))


@pytest.mark.parametrize("wrong", ["removed", "changed", "nan", "shape", "batch", "dtype", "garbage", "outside"])
def test_a_damaged_initial_state_is_refused(
    capfd: Capture, primed: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(primed.path, "bot")
    np.save("x.npy", frames(4))
    bot = Path("bot")
    (name,) = (str(state.initial) for state in primed.manifest.states if state.name == "0.conv")
    value = numpy_helper.to_array(onnx.load_tensor(bot / name))
    changed = {
        "nan": np.full_like(value, np.nan),
        "shape": value[:, :-1],
        "batch": np.repeat(value, 2, axis=0),
        "dtype": value.astype(np.float64),
    }
    if wrong in changed:
        forge(bot, name, numpy_helper.from_array(changed[wrong], "0.conv").SerializeToString())
    elif wrong == "garbage":
        forge(bot, name, b"\xff\xff")
    elif wrong == "outside":
        (bot / name).rename("outside")
        (bot / name).symlink_to(Path("outside").absolute())
    elif wrong == "changed":
        (bot / name).write_bytes(numpy_helper.from_array(value + 1, "0.conv").SerializeToString())
    else:
        (bot / name).unlink()
    for command in ("verify bot", "run bot --stream --input=x.npy --output=y.npy"):
        assert name in refused(capfd, *command.split(), status=1)


# Part of the graphs


@pytest.fixture(scope="module")
def stream_only(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    return ee.build(ANY, graph="stream", output=tmp_path_factory.mktemp("stream") / "b", seed=1, **TINY)


@pytest.fixture(scope="module")
def window_only(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    return ee.build(ANY, graph="window", output=tmp_path_factory.mktemp("window") / "b", seed=1, **TINY)


def test_a_bundle_has_the_graphs_that_were_asked_for(
    any_bundle: ee.Bundle, stream_only: ee.Bundle, window_only: ee.Bundle
) -> None:
    for bundle, graph in ((any_bundle, "both"), (stream_only, "stream"), (window_only, "window")):
        assert list(bundle.manifest.graphs) == GRAPHS[graph]
        folders = {path.name for path in bundle.path.iterdir() if path.is_dir()}
        assert folders == set(GRAPHS[graph])
        assert {path.parent.name for path in bundle.path.rglob("*.onnx")} == folders
        assert bool(bundle.manifest.states) == (graph != "window")
        # A graph is the same whatever stands beside it.
        for name in GRAPHS[graph]:
            model = f"{name}/model.onnx"
            assert bundle.manifest.files[model] == any_bundle.manifest.files[model]


def test_a_bundle_with_a_stream_only(
    capfd: Capture, stream_only: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bot, sequence = stream_only.path, frames(2, 20)
    model = ee.load(bot)
    assert (model.has_window, model.has_stream, model.max_sequence, model.providers) == (False, True, None, ["cpu"])
    with pytest.raises(ee.RequestError, match="has no window graph; use its stream, or build it with --graph both"):
        model(sequence)
    assert agrees(steps(model.stream(2), sequence), expected(stream_only, sequence))
    np.save("x.npy", sequence)
    message = refused(capfd, "run", bot, "--input=x.npy", "--output=y.npy")
    assert "has no window graph" in message
    done(capfd, "run", bot, "--stream", "--input=x.npy", "--output=y.npy")
    assert agrees(np.load("y.npy"), expected(stream_only, sequence))
    text = done(capfd, "verify", bot).out
    assert "prefix lengths" not in text
    assert f"followed as a stream, frame by frame, for {10 * WINDOW} frames, and from " in text
    report = ee.verify(bot)
    assert report.passed
    assert {case.graph for case in report.cases} == {"stream", "prefill"}
    assert json.loads(done(capfd, "inspect", bot, "--json").out)["model"] == str(bot / "stream/model.onnx")


def test_a_bundle_with_a_window_only(
    capfd: Capture, window_only: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bot, sequence = window_only.path, frames(2, WINDOW)
    model = ee.load(bot)
    assert (model.has_window, model.has_stream) == (True, False)
    with pytest.raises(ee.RequestError, match="has no stream graph; build it with --graph both or --graph stream"):
        model.stream()
    assert agrees(model(sequence), expected(window_only, sequence)[:, -1])
    np.save("x.npy", sequence)
    assert "has no stream graph" in refused(capfd, "run", bot, "--stream", "--input=x.npy", "--output=y.npy")
    text = done(capfd, "verify", bot).out
    assert "followed as a stream" not in text
    report = ee.verify(bot)
    assert (report.passed, report.frames, {case.graph for case in report.cases}) == (True, 0, {"window"})
    assert window_only.manifest.parity["frames"] == 0


@pytest.mark.parametrize("graph", GRAPHS["both"])
def test_inspect_shows_the_graph_that_is_asked_for(capfd: Capture, bundle: ee.Bundle, graph: str) -> None:
    path = bundle.path / f"{graph}/model.onnx"
    figures = json.loads(done(capfd, "inspect", bundle.path, "--graph", graph, "--json").out)
    assert figures["model"] == str(path)
    assert figures["metadata"]["edifice.graph"] == graph
    assert figures["sizes"] == {"batch": 1} if graph == "stream" else {"batch": 1, "sequence": WINDOW}
    assert [tensor["name"] for tensor in figures["inputs"]] == [
        spec["name"] for spec in Plain(bundle.path).manifest["graphs"][graph]["inputs"]
    ]
    assert figures["unknown"] == []
    batch = json.loads(done(capfd, "inspect", bundle.path, "--graph", graph, "--batch=4", "--json").out)
    assert 2 * figures["flops"] < batch["flops"] <= 4 * figures["flops"]
    if graph == "window":
        assert json.loads(done(capfd, "inspect", bundle.path, "--json").out) == figures
    else:
        # One frame costs much less than a window of them.
        window = json.loads(done(capfd, "inspect", bundle.path, "--json").out)
        assert (figures["flops"] < window["flops"] / 2) == (graph == "stream")
    assert f"past.{bundle.manifest.states[0].name}" in done(capfd, "inspect", bundle.path, "--graph=stream").out


def test_inspect_of_a_graph_that_there_is_not(
    capfd: Capture, window_only: ee.Bundle, any_bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for bundle, graph, says in (
        (window_only, "stream", r"--graph stream: bundle \S+ has window; name one of these"),
        (any_bundle, "frames", r"--graph frames: bundle \S+ has window, stream, prefill; name one of these"),
    ):
        assert re.search(says, refused(capfd, "inspect", bundle.path, "--graph", graph))
    model = any_bundle.path / "stream/model.onnx"
    assert "which is one graph; leave --graph out" in refused(capfd, "inspect", model, "--graph=stream")
    assert "sequence" in refused(capfd, "inspect", any_bundle.path, "--graph=stream", "--sequence=3")


# H3 with Edifice's numerics, which has no stream


def test_h3_with_edifices_numerics_says_why_it_has_no_stream_and_what_one_would_change(
    capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["build", "h3", f"--weights={GOLDEN / 'h3_long64.safetensors'}", "--output=bot"]
    messages = [refused(capfd, *arguments, *more) for more in ((), ("--graph=both",), ("--graph=stream",))]
    text = done(capfd, *arguments, "--graph=window").out
    gap = ee.load("bot").bundle.manifest.parity["recurrence_gap"]
    assert 1e-3 < gap < 1e-1
    assert describe_gap(gap) in text
    for graph, message in zip(("both", "both", "stream"), messages, strict=True):
        assert f"--graph {graph}: h3 with edifice numerics has no stream: Edifice's recurrence is a quotient" in message
        assert f"would change the output by up to {gap:.1e} within the window" in message
        assert "--graph window" in message
        assert "--numerics standard" in message
    # A bundle that is there stays when another is refused.
    with unchanged(tmp_path):
        assert "has no stream" in error_of(cli(capfd, *arguments))
    assert "followed as a stream" in done(capfd, *arguments, "--graph=stream", "--numerics=standard").out
    built = ee.load("bot").bundle.manifest
    assert (built.program.numerics, list(built.graphs)) == ("standard", GRAPHS["stream"])


def test_h3_with_edifices_numerics_has_no_stream_in_python_either(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match="h3 with edifice numerics has no stream"):
        ee.build("h3", numerics="edifice", output=tmp_path / "b", **TINY)
    with pytest.raises(ee.RequestError, match="graph must be window, stream, both, got 'prefill'"):
        ee.build("h3", graph="prefill", output=tmp_path / "b", **TINY)
    assert list(tmp_path.iterdir()) == []


# Damaged bundles


@any_architecture
def test_a_graph_that_is_not_the_manifests_is_refused(bundle: ee.Bundle, tmp_path: Path) -> None:
    """The manifest agrees with itself, and not with the model."""
    for index, (field, value) in enumerate(
        (("name", "0.other"), ("shape", ["batch", 3, 17]), ("dtype", "int64"), ("shape", ["batch", 3]))
    ):
        bot = tmp_path / str(index)
        shutil.copytree(bundle.path, bot)
        edit_manifest(bot, ("states", 1, field), value)
        edit_manifest(bot, ("states", 1, "initial"), 0)
        for graph in ("stream", "prefill"):
            for kind, prefix in (("inputs", "past"), ("outputs", "present")):
                renamed = f"{prefix}.{value}" if field == "name" else value
                edit_manifest(bot, ("graphs", graph, kind, 2, field), renamed)
            if value == "int64":  # which holds no such numbers
                edit_manifest(bot, ("graphs", graph, "inputs", 2, "values"), {"kind": "integers", "below": 16})
        model = ee.load(bot)
        assert model(frames(WINDOW)).shape == (HIDDEN,)
        with pytest.raises(ee.CheckError, match=r"the manifest says past\.0\..* the stream graph has past\.0\.conv"):
            model.stream()


@pytest.mark.parametrize("name", ["input_0.pb", "output_0.pb"])
@pytest.mark.parametrize("wrong", ["rank", "width", "length", "dtype", "nan", "garbage"])
@any_architecture
def test_a_damaged_test_sequence_is_a_damaged_bundle(bundle: ee.Bundle, tmp_path: Path, name: str, wrong: str) -> None:
    bot, path = tmp_path / "b", f"stream/test_sequence/{name}"
    shutil.copytree(bundle.path, bot)
    array = numpy_helper.to_array(onnx.load_tensor(bot / path))
    changed = {
        "rank": array[0],
        "width": array[..., :-1],
        "length": array[:, :-1],
        "dtype": array.astype(np.float64),
        "nan": np.full_like(array, np.nan),
    }
    tensor = b"\xff\xff" if wrong == "garbage" else numpy_helper.from_array(changed[wrong], "x").SerializeToString()
    forge(bot, path, tensor)
    if wrong == "length":
        assert not ee.verify(bot).passed
        return
    with pytest.raises(ee.CheckError, match=f"test data .*{name}"):
        ee.verify(bot)
    if wrong in ("rank", "width", "dtype"):
        # Neither does it help that the manifest says the same.
        place = ("graphs", "stream", "test_sequence", f"{name.partition('_')[0]}s", 0)
        edit_manifest(bot, (*place, "shape"), ["batch", "sequence", array.shape[2]][: changed[wrong].ndim])
        edit_manifest(bot, (*place, "shape", -1), changed[wrong].shape[-1])
        edit_manifest(bot, (*place, "dtype"), str(changed[wrong].dtype))
        with pytest.raises(ee.CheckError, match="test_sequence"):
            ee.verify(bot)


@any_architecture
def test_a_bundle_need_not_have_a_test_sequence(bundle: ee.Bundle, tmp_path: Path) -> None:
    for value in (None, REMOVED):
        bot = tmp_path / str(value)
        shutil.copytree(bundle.path, bot)
        edit_manifest(bot, ("graphs", "stream", "test_sequence"), value)
        report = ee.verify(bot)
        assert report.passed
        assert not any(case.source == "stream/test_sequence" for case in report.cases)


# run --stream


def save(path: Path, sequence: np.ndarray) -> None:
    match path.suffix:
        case ".npy":
            np.save(path, sequence)
        case ".npz":
            np.savez(path, state_sequence=sequence, labels=np.zeros(3))
        case ".csv":
            np.savetxt(path, sequence, delimiter=",", fmt="%.9g")


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [(".npy", (1,)), (".npy", (40,)), (".csv", (20,)), (".npz", (20,)), (".npy", (3, 20)), (".npz", (1, 9))],
)
def test_run_streams_a_recording(
    capfd: Capture, tmp_path: Path, bundle: ee.Bundle, suffix: str, shape: tuple[int, ...]
) -> None:
    sequence = frames(*shape)
    source, target = tmp_path / f"x{suffix}", tmp_path / "y.npy"
    save(source, sequence)
    text = done(capfd, "run", bundle.path, "--stream", "--input", source, "--output", target, "--threads=1").out
    batched = sequence if len(shape) == 2 else sequence[None]
    wanted = steps(ee.load(bundle, threads=1).stream(len(batched)), batched)
    found = np.load(target)
    np.testing.assert_array_equal(found, wanted if len(shape) == 2 else wanted[0])
    assert found.dtype == np.float32
    count, number = len(batched), f"{len(batched)} recording{'s' * (len(batched) != 1)}"
    assert re.search(rf"^streamed {number} of {shape[-1]} frames on cpu \(\d+ nodes\): ", text)
    assert f"{target} float32 {[*shape, HIDDEN]}\n" in text
    assert set(tmp_path.iterdir()) == {source, target}
    report = json.loads(
        done(capfd, "run", bundle.path, "--stream", "--input", source, "--output", target, "--stride=1", "--json").out
    )
    assert report.pop("providers")["cpu"] > 10
    assert report == {
        "output": str(target),
        "shape": [*shape, HIDDEN],
        "frames": shape[-1],
        "batch": count,
        "passed_over": {},
        "lines": {"header": None, "first": 1, "last": shape[-1]} if suffix == ".csv" else None,
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@any_architecture
def test_a_frame_that_is_not_finite_is_named_and_nothing_is_written(
    capfd: Capture, bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.chdir(tmp_path)
    sequence = frames(2, 20)
    sequence[1, 13, 4] = value
    np.save("x.npy", sequence)
    Path("y.npy").write_bytes(b"old")
    message = refused(capfd, "run", bundle.path, "--stream", "--input=x.npy", "--output=y.npy")
    assert f"x.npy, frame 13: frame: holds {value} at [1, 4]" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--input=x.npy --stride=2", "--stride 2: a stream sees every frame"),
        ("--input=x.npy --stride=0", "stride must be an integer from 1"),
        ("--input=wide.npy", r"wide.npy must be \[frames, 6\]"),
        ("--input=double.npy", "must be native float32"),
        ("--input=no.npy", "no.npy does not exist"),
        ("--input=x.npy --output=x.npy", "x.npy: is the input"),
        ("--input=x.npy --output=bot/y.npy", "is inside the bundle"),
        ("--input=x.npy --output=no/y.npy", "no/y.npy"),
        ("--input=x.npy --provider=gpu", "'gpu' is unknown"),
    ],
)
@any_architecture
def test_wrong_requests_are_refused(
    capfd: Capture, bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle.path, "bot")
    np.save("x.npy", frames(9))
    np.save("wide.npy", np.zeros((9, 12), np.float32))
    np.save("double.npy", np.zeros((9, 6)))
    given: list[Any] = arguments.split()
    if "--output" not in arguments:
        given.append("--output=y.npy")
    assert re.search(says, refused(capfd, "run", "bot", "--stream", *given))
