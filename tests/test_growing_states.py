"""States that grow, keys and values of full attention, beside one that keeps its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cli_helpers import Capture, done
from module_cases import exported, largest_error, program

import edifice_export as ee
from edifice_export.bundle.manifest_reader import read_manifest

LENGTH = 17  # the example has 6 frames


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    return exported("recall", tmp_path_factory)


@pytest.fixture(scope="module")
def model(bundle: ee.Bundle) -> ee.Model:
    return ee.load(bundle)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(8).standard_normal((2, LENGTH, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def wanted(frames: np.ndarray) -> np.ndarray:
    """What the window gives at every position, in float64."""
    outputs: np.ndarray = program("recall").run({"x": frames})["output"]
    return outputs


def steps(stream: ee.Stream, frames: np.ndarray) -> np.ndarray:
    return np.stack([stream.step(frames[:, t]) for t in range(frames.shape[1])], axis=1)


def test_the_manifest_says_which_size_grows(bundle: ee.Bundle) -> None:
    graphs = bundle.manifest.graphs
    assert [*map(str, graphs["stream"].inputs[1:])] == [
        "past.0.conv float32 [batch, 2, 8]",
        "past.1.key float32 [batch, 2, past, 4]",
        "past.1.value float32 [batch, 2, past, 4]",
    ]
    assert str(graphs["stream"].outputs[-1]) == "present.1.value float32 [batch, 2, past + 1, 4]"
    assert str(graphs["prefill"].outputs[-1]) == "present.1.value float32 [batch, 2, past + time, 4]"
    seen = [inputs["past.1.key"].shape[2] for _, inputs, _ in bundle.test_data("stream")]
    assert seen == [0, 1, 2, 9]


def test_every_frame_is_that_of_the_window(model: ee.Model, frames: np.ndarray, wanted: np.ndarray) -> None:
    assert largest_error(steps(model.stream(batch=2), frames), wanted) <= 1e-5


@pytest.mark.parametrize("pieces", [(1,), (LENGTH,), (1, 1, 5), (4, 1, 9)])
def test_histories_are_handed_over_in_pieces(
    pieces: tuple[int, ...], model: ee.Model, frames: np.ndarray, wanted: np.ndarray
) -> None:
    stream, end = model.stream(batch=2), 0
    for length in pieces:
        start, end = end, end + length
        assert largest_error(stream.prefill(frames[:, start:end]), wanted[:, end - 1]) <= 1e-5
    if end < LENGTH:
        assert largest_error(steps(stream, frames[:, end:]), wanted[:, end:]) <= 1e-5


def test_going_back_gives_the_same_numbers(model: ee.Model, frames: np.ndarray) -> None:
    stream = model.stream(batch=2, history=6)
    steps(stream, frames[:, :5])
    mark = stream.snapshot()
    first = steps(stream, frames[:, 5:])
    stream.rewind(4)
    assert np.array_equal(steps(stream, frames[:, -4:]), first[:, -4:])
    stream.restore(mark)
    assert np.array_equal(steps(stream, frames[:, 5:]), first)
    other = model.stream(batch=2)
    other.restore(mark)
    assert np.array_equal(steps(other, frames[:, 5:]), first)
    stream.reset()
    assert np.array_equal(steps(stream, frames), steps(model.stream(batch=2), frames))


def test_a_file_holds_as_many_frames_as_there_were(model: ee.Model, frames: np.ndarray, tmp_path: Path) -> None:
    for seen in (0, 7):
        stream, path = model.stream(batch=2), tmp_path / f"{seen}.safetensors"
        steps(stream, frames[:, :seen]) if seen else None
        stream.save(path)
        assert safetensors.numpy.load_file(path)["1.key"].shape == (2, 2, seen, 4)
        other = model.stream(batch=2)
        other.load(path)
        assert np.array_equal(steps(other, frames[:, seen:]), steps(stream, frames[:, seen:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"1.value": (2, 2, 4, 4)},
            r"1.value should be float32 \[2, 2, 3, 4\] for this stream, found float32 \[2, 2, 4, 4\]",
        ),
        ({"1.key": (2, 3, 3, 4)}, r"1.key should be float32 \[2, 2, 3, 4\] .* found float32 \[2, 3, 3, 4\]"),
        ({"1.key": (2,)}, r"1.key should be float32 \[2, 2, 0, 4\] .* found float32 \[2\]"),
        ({"0.conv": (2, 3, 8)}, r"0.conv should be float32 \[2, 2, 8\] .* found float32 \[2, 3, 8\]"),
    ],
)
def test_a_file_of_odd_sizes_is_refused(
    change: dict[str, tuple[int, ...]], message: str, model: ee.Model, frames: np.ndarray, tmp_path: Path
) -> None:
    stream, path = model.stream(batch=2), tmp_path / "state.safetensors"
    steps(stream, frames[:, :3])
    stream.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        said = file.metadata()
    odd = {name: np.zeros(shape, np.float32) for name, shape in change.items()}
    safetensors.numpy.save_file({**safetensors.numpy.load_file(path), **odd}, path, said)
    before = stream.snapshot()
    with pytest.raises(ee.RequestError, match=message):
        stream.load(path)
    after = stream.step(frames[:, 3])
    stream.restore(before)
    assert np.array_equal(stream.step(frames[:, 3]), after)


def test_no_entry_starts_alone(model: ee.Model, frames: np.ndarray) -> None:
    stream = model.stream(batch=2)
    steps(stream, frames[:, :3])
    with pytest.raises(
        ee.RequestError, match=r"reset \[1\]: 1.key grows with the stream, .* or open a stream for each"
    ):
        stream.reset([1])


def _state(change: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["states"][1].update(change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_state({"shape": ["batch", "past", "past", 4]}), "should be .batch, sizes., of which one may be past"),
        (_state({"shape": ["past", 2, "past", 4]}), "should be .batch, sizes., of which one may be past"),
        (_state({"shape": ["batch", 2, "past + 1", 4]}), "should be .batch, sizes., of which one may be past"),
        (_state({"shape": ["batch", 2, "time", 4]}), "should be .batch, sizes., of which one may be past"),
        (
            _state({"initial": "stream/model.onnx"}),
            "the state 1.key grows from nothing: it needs the size past, and no",
        ),
        (_state({"shape": ["batch", 2, 0, 4]}), "should hold positive sizes and symbols only"),
        (lambda manifest: manifest["sizes"].pop("past"), "the state 1.key grows from nothing: it needs the size past"),
        (lambda manifest: manifest["sizes"].update(past=0), "the size 'past' is 0"),
        (
            lambda manifest: manifest["graphs"]["prefill"]["outputs"][-1].update(shape=["batch", 2, "past + 1", 4]),
            r"the prefill graph's last outputs should be .*past \+ time",
        ),
    ],
)
def test_a_manifest_of_odd_states_is_refused(
    damage: Callable[[dict[str, Any]], Any], message: str, bundle: ee.Bundle, tmp_path: Path
) -> None:
    shutil.copy(bundle.path / "manifest.json", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    damage(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ee.CheckError, match=message):
        read_manifest(tmp_path)


def test_costs_are_those_after_a_windows_frames(bundle: ee.Bundle, capfd: Capture) -> None:
    assert "past 6" in done(capfd, "inspect", bundle.path, "--graph=stream").out
    assert "past" not in done(capfd, "inspect", bundle.path).out.split("FLOPs")[0].split("counted for")[1]
    measured = ee.bench(bundle, graph="stream", rounds=2, threads=[1], batch=[1])
    assert "frames of a stream are measured after 6 others: its states grow" in measured.notes


def test_what_was_not_run_is_not_counted(bundle: ee.Bundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A batch of which one entry starts anew: Recurrent's was compared at 6 frames, and none of this one's can."""
    other = exported("recurrent", tmp_path_factory).manifest.parity
    assert (bundle.manifest.parity["cases"], bundle.manifest.parity["frames"]) == (
        other["cases"] - 6 + 1,
        other["frames"],
    )
