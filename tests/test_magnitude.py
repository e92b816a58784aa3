"""Numbers that float32 has and no model can take: refused before anything runs, and whatever overflows all the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_helpers import Capture, cli, error_of, forge, unchanged
from conftest import ANY, any_architecture
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stream_helpers import WINDOW, agrees, contents, expected, frames, same, steps

import edifice_export as ee
from edifice_export.errors import NotFiniteError
from edifice_export.runtime.arrays import MAX_MAGNITUDE

TOO_LARGE = [3.4e38, -3.4e38, 1e30, 1e20, -1e19, 1e18, 1.0001e12]


@pytest.fixture(scope="module")
def model(bundle: ee.Bundle) -> ee.Model:
    return ee.load(bundle, threads=1)


@pytest.fixture(scope="module")
def overflowing(any_bundle: ee.Bundle, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """A bundle whose outputs are beyond float32 for any frame: the last norm multiplies by its largest number."""
    bot = tmp_path_factory.mktemp("overflowing") / "bot"
    shutil.copytree(any_bundle.path, bot)
    for entry in any_bundle.manifest.graphs.values():
        graph = onnx.load(bot / entry.model)
        weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "final_norm.weight")
        largest = np.full(list(weight.dims), 3.4e38, np.float32)
        weight.CopyFrom(numpy_helper.from_array(largest, weight.name))
        forge(bot, entry.model, graph.SerializeToString())
    return ee.load(bot).bundle


def spoiled(*shape: int, place: tuple[int, ...], value: float) -> np.ndarray:
    found = frames(*shape, seed=9)
    found[place] = value
    return found


@pytest.mark.parametrize("value", TOO_LARGE)
def test_a_frame_that_is_too_large_is_refused_and_the_stream_goes_on_as_if_it_had_not_been(
    model: ee.Model, value: float
) -> None:
    sequence, stream, plain = frames(2, 9), model.stream(2), model.stream(2)
    np.testing.assert_array_equal(steps(stream, sequence[:, :4]), steps(plain, sequence[:, :4]))
    before, shown = contents(stream), re.escape(f"{np.float32(value):g}")
    with pytest.raises(ee.RequestError, match=rf"^frame: holds {shown} at \[1, 3\]; numbers up to 1e\+12 are taken"):
        stream.step(spoiled(2, place=(1, 3), value=value))
    with pytest.raises(ee.RequestError, match=rf"^state_sequence: holds {shown} at \[0, 5, 2\] in frame 5; numbers up"):
        stream.prefill(spoiled(2, 7, place=(0, 5, 2), value=value))
    assert same(contents(stream), before)
    assert stream.rewindable == 4
    np.testing.assert_array_equal(steps(stream, sequence[:, 4:]), steps(plain, sequence[:, 4:]))


@pytest.mark.parametrize("value", [*TOO_LARGE, np.nan, -np.inf])
@any_architecture
def test_a_window_that_is_too_large_is_refused(model: ee.Model, value: float) -> None:
    shown = re.escape(f"{np.float32(value):g}")
    with pytest.raises(ee.RequestError, match=rf"^state_sequence: holds {shown} at \[1, 2, 0\] in frame 2; "):
        model(spoiled(2, 4, place=(1, 2, 0), value=value))


def test_up_to_the_limit_the_numbers_are_right(model: ee.Model) -> None:
    """Frames of the limit and its negative, and others beside small ones."""
    largest = np.where(frames(3, 2 * WINDOW) > 0, np.float32(MAX_MAGNITUDE), np.float32(-MAX_MAGNITUDE))
    largest[1] = (frames(2 * WINDOW, seed=2) * np.float32(1e11)).clip(-MAX_MAGNITUDE, MAX_MAGNITUDE)
    largest[2, ::2] = frames(WINDOW, seed=3)
    wanted = expected(model.bundle, largest)
    assert agrees(steps(model.stream(3), largest), wanted)
    assert agrees(model.stream(3).prefill(largest), wanted[:, -1])
    assert agrees(model(largest[:, :WINDOW]), wanted[:, WINDOW - 1])


@pytest.mark.parametrize("numerics", ["standard", "edifice"])
def test_weights_with_which_the_limit_overflows_are_refused(
    any_bundle: ee.Bundle, tmp_path: Path, numerics: str
) -> None:
    """Torch's float32 gives NaN or, with edifice numerics, the same zeros as the graph."""
    weights = any_bundle.path / "weights.safetensors"
    tensors = load_file(weights)
    with safe_open(weights, framework="numpy") as file:
        said = file.metadata()
    tensors["input_projection.weight"] *= np.float32(1e9)
    save_file(tensors, tmp_path / "large.safetensors", said)
    with pytest.raises(ee.CheckError, match=r"magnitude 1e\+12"):
        ee.build(
            ANY, weights=tmp_path / "large.safetensors", numerics=numerics, graph="window", output=tmp_path / "bot"
        )
    assert not (tmp_path / "bot").exists()


def test_an_output_that_is_not_finite_is_not_handed_out_and_the_stream_stays(overflowing: ee.Bundle) -> None:
    model = ee.load(overflowing, threads=1)
    with pytest.raises(NotFiniteError, match=r"^output: is not finite for entry 0 of the batch: float32 overflows"):
        model(frames(2, 4))
    stream = model.stream(2)
    before = contents(stream)
    calls: list[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = [
        (stream.step, frames(2)),
        (stream.prefill, frames(2, 4)),
        (stream.prefill, frames(2, 1500)),
    ]
    for call, given in calls:
        with pytest.raises(ee.CheckError, match=r"^output: is not finite .*, and the stream stays where it was; scale"):
            call(given)
        assert same(contents(stream), before)
        assert stream.rewindable == 0


def test_an_output_that_is_not_finite_fails_verification(overflowing: ee.Bundle) -> None:
    report = ee.verify(overflowing)
    failed = {case.graph for case in report.cases if case.max_abs == np.inf}
    assert (report.passed, failed) == (False, {"window", "stream", "prefill"})
    assert report.departure is not None


@pytest.mark.parametrize(
    ("way", "place"), [((), r"frames 0 to 6 of recording 0"), (("--stream",), r"frame 0: output: is not finite")]
)
def test_run_says_where_the_output_is_not_finite(
    capfd: Capture, overflowing: ee.Bundle, tmp_path: Path, way: tuple[str, ...], place: str
) -> None:
    np.save(tmp_path / "x.npy", frames(2, 9))
    with unchanged(tmp_path):
        outcome = cli(
            capfd, "run", overflowing.path, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", *way
        )
    assert re.search(rf"x\.npy, {place}", error_of(outcome, status=1))


@pytest.mark.parametrize("value", [3.4e38, 1e19])
@pytest.mark.parametrize(("way", "place"), [((), "[0, 13, 4] it is"), (("--stream",), "frame 13: frame: holds")])
@any_architecture
def test_run_names_the_frame_and_writes_nothing(
    capfd: Capture, bundle: ee.Bundle, tmp_path: Path, value: float, way: tuple[str, ...], place: str
) -> None:
    np.save(tmp_path / "x.npy", spoiled(20, place=(13, 4), value=value))
    np.savetxt(tmp_path / "x.csv", spoiled(20, place=(13, 4), value=value), delimiter=",")
    for name, says in (("x.npy", place), ("x.csv", "x.csv, line 14, column 5: ")):
        with unchanged(tmp_path):
            outcome = cli(capfd, "run", bundle.path, "--input", tmp_path / name, "--output", tmp_path / "y.npy", *way)
        message = error_of(outcome)
        assert says in message
        assert "numbers up to 1e+12 are taken" in message


@any_architecture
def test_run_says_which_line_was_taken_as_what(capfd: Capture, bundle: ee.Bundle, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "x.csv", frames(9), delimiter=",", header=",".join("uvwxyz"), comments="")
    given = ["run", bundle.path, "--input", tmp_path / "x.csv", "--output", tmp_path / "y.npy"]
    for way in ([], ["--stream"]):
        text = cli(capfd, *given, *way).out
        assert f"{tmp_path / 'x.csv'}: line 1 taken as the header, lines 2 to 10 as frames\n" in text
        report: dict[str, Any] = json.loads(cli(capfd, *given, *way, "--json").out)
        assert report["lines"] == {"header": 1, "first": 2, "last": 10}
