"""Bundles whose graphs share a file of weights: where numbers are, that nothing else changes, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cli_helpers import edit_manifest, forge, trace_once
from conftest import TINY, others_slow
from onnxruntime.quantization import quantize_dynamic
from safetensors.numpy import load_file
from torch import nn

import edifice_export as ee
from edifice_export.building.weight_file import WeightFile
from edifice_export.inspection.inspect import inspect_model
from edifice_export.weights import read_checkpoint

OPTIONS: dict[str, Any] = TINY | {"hidden_size": 128, "num_layers": 1}
"""A model with more than 1 MiB of weights."""

WEIGHTS = "weights.safetensors"


class Pair(NamedTuple):
    """The same model in both layouts."""

    shared: ee.Bundle
    single: ee.Bundle


@pytest.fixture(scope="module")
def pair(bundle: ee.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edifice_export.building.assemble.SHARED_FROM", 0)
        patch.setattr("edifice_export.building.weight_file._SMALL", 64)
        patch.setattr("edifice_export.building.weight_file._KEY", 16)
        place = tmp_path_factory.mktemp("shared") / "b"
        return Pair(ee.build(bundle.manifest.program.name, output=place, seed=1, **TINY), bundle)


@pytest.fixture(scope="module")
def hymba(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """Large enough to share a file by itself."""
    return ee.build("hymba", output=tmp_path_factory.mktemp("hymba") / "b", **OPTIONS)


@pytest.fixture
def bot(hymba: ee.Bundle, tmp_path: Path) -> Path:
    """One to change."""
    shutil.copytree(hymba.path, tmp_path / "bot")
    return tmp_path / "bot"


@others_slow
def test_both_layouts_give_the_same_bits(pair: Pair) -> None:
    models = [ee.load(bundle) for bundle in pair]
    frames = np.random.default_rng(3).standard_normal((2, 7, 6)).astype(np.float32)
    first, second = (model(frames) for model in models)
    assert np.array_equal(first, second)
    streams = [model.stream(batch=2) for model in models]
    for stream in streams:
        stream.prefill(frames)
    for _ in range(3):
        first, second = (stream.step(frames[:, 0]) for stream in streams)
        assert np.array_equal(first, second)
    assert models[0].placement == models[1].placement, "what a runtime makes of both is the same graph"


@others_slow
def test_every_number_is_there_once(pair: Pair) -> None:
    shared, single = (bundle.manifest for bundle in pair)
    assert {graph.weights for graph in shared.graphs.values()} == {WEIGHTS} == {shared.reference}
    assert {graph.weights for graph in single.graphs.values()} == {None}
    assert set(shared.files) - set(single.files) == {f"{graph}.onnx" for graph in shared.graphs}
    held, reference = load_file(pair.shared.file(WEIGHTS)), load_file(pair.single.file(WEIGHTS))
    assert all(np.array_equal(held.pop(name), value) for name, value in reference.items())
    # Hyena's filters are made of other numbers, and so in the file beside them.
    assert all(name.startswith("graph/") for name in held)
    seen = {value.tobytes() for value in reference.values()}
    for value in held.values():
        forms = {value.tobytes(), value.T.tobytes()}
        assert not forms & seen
        seen |= forms


@others_slow
def test_the_reference_is_read_without_what_graphs_have(pair: Pair, tmp_path: Path) -> None:
    found, wanted = (read_checkpoint(bundle.file(WEIGHTS)) for bundle in pair)
    assert found.tensors.keys() == wanted.tensors.keys()
    assert (found.architecture, found.options, found.numerics) == (wanted.architecture, wanted.options, wanted.numerics)
    ee.convert(pair.shared.file(WEIGHTS), tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == wanted.tensors.keys()


def test_a_bundle_above_the_limit_is_small_and_does_all_that_others_do(hymba: ee.Bundle) -> None:
    sizes = {name: entry.size for name, entry in hymba.manifest.files.items()}
    tests = sum(size for name, size in sizes.items() if name.endswith(".pb"))
    assert sum(sizes.values()) - tests < 1.3 * 4 * hymba.manifest.param_count
    assert ee.verify(hymba).passed
    assert ee.bench(hymba, rounds=1, threads=[1]).results
    found = inspect_model(hymba.file("window.onnx"), {"sequence": 7})
    assert found.disk_bytes == sizes["window.onnx"] + sizes[WEIGHTS]
    assert ee.verify(hymba, tolerance=1e-12).departure is not None


@pytest.mark.parametrize("graph", ["window", "stream"])
def test_onnx_runtimes_own_tools_take_a_graph(hymba: ee.Bundle, graph: str, tmp_path: Path) -> None:
    """Dynamic quantization takes it; weights that are transposed when a graph is loaded it leaves as they are."""
    quantize_dynamic(hymba.file(f"{graph}.onnx"), tmp_path / "model.onnx")
    _, inputs, outputs = next(hymba.test_data(graph))
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(list(outputs), inputs), outputs.values(), strict=True):
        assert np.abs(found - wanted).max() < 0.5 * max(1, np.abs(wanted).max())


class Layers(nn.Module):
    """Two layers that share an input, one of them used twice, in a window of 3-D products."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(400, 400), nn.Linear(400, 400)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) + self.one(x)


def test_a_module_has_a_file_of_what_its_graph_uses(tmp_path: Path) -> None:
    shapes = {"x": {0: "batch", 1: "time"}}
    bundle = ee.export(Layers(), (torch.randn(2, 3, 400),), dynamic_shapes=shapes, output=tmp_path / "b")
    assert bundle.manifest.reference is None
    held = load_file(bundle.file(WEIGHTS))
    assert {"graph/one.weight", "graph/two.weight"} <= held.keys()
    assert sum(value.nbytes for value in held.values()) <= 4 * bundle.manifest.param_count
    with pytest.raises(ee.RequestError, match="missing"):
        ee.build("h3", weights=bundle.file(WEIGHTS), output=tmp_path / "no", **OPTIONS)


# Where bytes lie


def graph_of(name: str, **constants: np.ndarray) -> onnx.ModelProto:
    tensors = [onnx.numpy_helper.from_array(value, key) for key, value in constants.items()]
    return onnx.helper.make_model(onnx.helper.make_graph([], name, [], [], tensors))


def read_back(model: onnx.ModelProto, folder: Path) -> dict[str, np.ndarray]:
    onnx.load_external_data_for_model(model, str(folder))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_joined_constants_are_the_bytes_of_their_parts_and_what_contradicts_is_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal((20, 16)).astype(np.float32) for _ in "abc")
    whole = generator.integers(0, 9, 200)
    given = [
        {"ab": np.concatenate([a, b]), "rows": c[4:16], "n": whole, "flags": np.arange(601) % 3 == 0},
        {"bc": np.concatenate([b, c]), "abc": np.concatenate([a, b, c])},
        {"ca": np.concatenate([c, a]), "ac": np.concatenate([a, c]), "aa": np.concatenate([a, a])},
    ]
    weights = WeightFile({"c": c, "a": a, "b": b}, whole=True)
    models = [graph_of(str(index), **constants) for index, constants in enumerate(given)]
    for model in models:
        weights.strip(model)
    weights.write(tmp_path / WEIGHTS, {})
    for model, constants in zip(models, given, strict=True):
        weights.point(model, WEIGHTS)
        for tensor in model.graph.initializer:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
            assert not tensor.raw_data
        found = read_back(model, tmp_path)
        for name, value in constants.items():
            np.testing.assert_array_equal(found[name], value)
    held = load_file(tmp_path / WEIGHTS)
    assert held.keys() == {"a", "b", "c", "graph/n", "graph/flags", "graph/ca", "graph/ac", "graph/aa"}


# What is refused


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def entries(tensor: onnx.TensorProto) -> dict[str, onnx.StringStringEntryProto]:
    return {entry.key: entry for entry in tensor.external_data}


def place(key: str, value: str) -> Callable[[Path], None]:
    """Has the first constant that is in the file lie elsewhere, and the manifest vouch for the model."""

    def do(bot: Path) -> None:
        model = onnx.load(bot / "window.onnx", load_external_data=False)
        tensor = next(each for each in model.graph.initializer if each.external_data)
        entries(tensor)[key].value = value
        forge(bot, "window.onnx", model.SerializeToString())

    return do


def said_to_be(weights: object) -> Callable[[Path], None]:
    return lambda bot: edit_manifest(bot, ("graphs", "window", "weights"), weights)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another bit": (lambda bot: flip(bot / WEIGHTS), f"{WEIGHTS} was changed since"),
    "no file": (lambda bot: (bot / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "a cut": (lambda bot: (bot / WEIGHTS).write_bytes((bot / WEIGHTS).read_bytes()[:-4]), "bytes and has"),
    "outside": (said_to_be("../weights"), "'../weights' leaves the bundle"),
    "elsewhere": (said_to_be("window/test_data_set_0/input_0.pb"), "are not a file beside 'window.onnx'"),
    "the model": (said_to_be("window.onnx"), "are not a file beside 'window.onnx'"),
    "not listed": (said_to_be("others"), "'others' is used and not listed"),
    "no text": (said_to_be(5), "'weights' of graphs 'window' should be str"),
    "nowhere": (said_to_be(None), "it reads 'weights.safetensors', not a file of the bundle"),
    "another file": (place("location", "manifest.json"), "it reads 'manifest.json', not a file of the bundle"),
    "beyond the end": (place("offset", "100000000"), "from 100000000 on of weights.safetensors, which has"),
    "more than there is": (place("length", "100000000"), "it reads 100000000 bytes"),
    "before the start": (place("offset", "-4"), "from -4 on"),
    "no number": (place("offset", "1e3"), "from 1e3 on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_are_what_the_manifest_says_and_within_their_file(bot: Path, case: str) -> None:
    damage, says = REFUSED[case]
    damage(bot)
    for read in (ee.load, ee.verify):
        with pytest.raises(ee.CheckError, match=says):
            read(bot)


def test_single_file_is_refused_where_no_file_holds_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_once(monkeypatch)
    monkeypatch.setattr("edifice_export.building.assemble._MAX_INSIDE", 1000)
    with pytest.raises(ee.RequestError, match="--single-file: a graph has"):
        ee.build("hymba", output=tmp_path / "b", graph="window", single_file=True, **TINY)
    with pytest.raises(ee.RequestError, match="single_file"):
        ee.build("hymba", output=tmp_path / "b", single_file="yes", **TINY)  # type: ignore[arg-type]
