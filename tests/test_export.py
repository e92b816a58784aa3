"""The whole road: builds against Edifice, from weights and from a seed, in every form a user may ask for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_helpers import forge
from conftest import TINY, any_architecture
from golden_cases import CASES, GOLDEN, architecture_of, load_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import edifice_export as ee
from edifice_export.inspection.report import inspect_path
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_export.weights import encode_safetensors, read_checkpoint
from edifice_reference.models.config import NUMERICS
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture, get_architecture

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda known: known.name)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_edifices_weights_give_edifices_output(path: Path, tmp_path: Path) -> None:
    bundle = ee.build(architecture_of(path), weights=path, graph="window", output=tmp_path / "b")
    _, example = load_case(path)
    found = ee.load(bundle)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() < 1e-5
    assert bundle.manifest.program.numerics == "edifice"
    assert bundle.manifest.weights["source"] == path.name


def test_a_bundle_is_what_its_manifest_says(bundle: ee.Bundle) -> None:
    manifest = bundle.manifest
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "manifest.json"}
    assert manifest.program.options == get_architecture(manifest.program.name).config_class(**TINY).options()
    assert (manifest.program.numerics, manifest.precision, manifest.target, manifest.seed) == (
        "standard",
        "fp32",
        "portable",
        1,
    )
    assert manifest.parity["cases"] > 30
    assert 0 < manifest.parity["max_abs"] < 1e-4
    assert str(bundle.path.parent) not in (bundle.path / "manifest.json").read_text()


def test_a_lone_model_describes_itself(bundle: ee.Bundle) -> None:
    said = {entry.key: entry.value for entry in onnx.load(bundle.file("window/model.onnx")).metadata_props}
    assert json.loads(said["edifice.program"]) == {
        "kind": "architecture",
        "name": bundle.manifest.program.name,
        "options": bundle.manifest.program.options,
        "numerics": "standard",
    }
    assert json.loads(said["edifice.sizes"]) == {"batch": 1, "sequence": TINY["window_size"]}
    assert said["edifice.frames"] == "sequence"
    assert json.loads(said["edifice.values"]) == {"state_sequence": {"kind": "normal", "below": None}}
    assert json.loads(said["edifice.positions"]) == {"output": "last"}


def test_test_data_is_the_float64_references(bundle: ee.Bundle) -> None:
    from edifice_export.programs.reference_model import reference_of

    reference = reference_of(bundle).double()
    lengths = []
    for _, inputs, outputs in bundle.test_data("window"):
        (x,), (y,) = inputs.values(), outputs.values()
        with torch.no_grad():
            expected = reference(torch.tensor(x, dtype=torch.float64)).float().numpy()
        np.testing.assert_array_equal(y, expected)
        lengths.append(x.shape[:2])
    assert lengths == [(1, 7), (2, 4)]


@any_architecture
def test_another_seed_makes_other_weights(bundle: ee.Bundle, tmp_path: Path) -> None:
    """The same one gives the same bytes, see test_cli."""
    other = ee.build(bundle.manifest.program.name, output=tmp_path / "other", seed=2, graph="window", **TINY)
    assert other.manifest.files["weights.safetensors"] != bundle.manifest.files["weights.safetensors"]


def test_a_bundles_own_weights_build_the_same_bundle(bundle: ee.Bundle, tmp_path: Path) -> None:
    weights, output = bundle.file("weights.safetensors"), tmp_path / "rebuilt"
    rebuilt = ee.build(bundle.manifest.program.name, weights=weights, seed=1, graph="window", output=output)
    of_stream = ("stream/", "prefill/")
    files = {name: entry for name, entry in bundle.manifest.files.items() if not name.startswith(of_stream)}
    assert rebuilt.manifest.files == files
    assert rebuilt.manifest.program.options == bundle.manifest.program.options


def untold(architecture: Architecture) -> dict[str, Any]:
    """The options that no shape tells and that change an output, as TINY and the defaults have them."""
    config = architecture.config_class(**TINY)
    names = [field.name for field in dataclasses.fields(config) if field.metadata["untold"]]
    if config.stream_ends_with_window:
        names.append("window_size")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("form", ["own", "slash", "dot"])
def test_weights_without_metadata_tell_their_options(form: str, bundle: ee.Bundle, tmp_path: Path) -> None:
    """But for those that no shape tells: they are asked for. Edifice's own safetensors have `layer.param` names."""
    known = get_architecture(bundle.manifest.program.name)
    own = load_file(bundle.file("weights.safetensors"))
    tensors = own if form == "own" else ee.to_edifice(own, known.name)
    if form == "dot":
        tensors = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(encode_safetensors(tensors, {"unrelated": "metadata"}))
    assert (read_checkpoint(bare).source.name == "edifice") is (form != "own")
    given = untold(known)
    for name in given:
        fewer = {other: value for other, value in given.items() if other != name}
        with pytest.raises(ee.RequestError, match=f"does not say {name}.* give --{name.replace('_', '-')}"):
            ee.build(known.name, weights=bare, output=tmp_path / "b", **fewer)
    with pytest.raises(ee.RequestError, match=r"hidden_size 16 contradicts .* tensors whose shapes say hidden_size 8"):
        ee.build(known.name, weights=bare, output=tmp_path / "b", **given, hidden_size=16)
    assert not (tmp_path / "b").exists()
    given |= {"window_size": 7}
    built = ee.build(known.name, weights=bare, output=tmp_path / "b", seed=1, graph="window", **given)
    assert built.manifest.program.numerics == ("standard" if form == "own" else "edifice")
    assert built.manifest.program.options == bundle.manifest.program.options
    theirs = load_file(built.file("weights.safetensors"))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.slow
@each_architecture
@pytest.mark.parametrize("numerics", NUMERICS)
def test_odd_options(architecture: Architecture, numerics: str, tmp_path: Path) -> None:
    """A window of one frame, one layer, widths that are odd, no projection; then more of everything."""
    names = {field.name for field in dataclasses.fields(architecture.config_class)}
    least = {"embed_dim": 15, "hidden_size": 15, "num_layers": 1, "window_size": 1, "state_size": 1, "conv_size": 1}
    least |= {"num_heads": 3, "head_dim": 5, "order": 1, "filter_size": 1, "expand_factor": 1}
    more = {"embed_dim": 5, "hidden_size": 9, "num_layers": 2, "window_size": 5, "state_size": 5, "conv_size": 7}
    more |= {"num_heads": 3, "head_dim": 5, "order": 3, "filter_size": 5, "expand_factor": 3}
    for options in (least, more):
        options = {name: value for name, value in options.items() if name in names}
        output = tmp_path / str(options["window_size"])
        graph = "both" if numerics == "standard" else "window"
        bundle = ee.build(architecture.name, output=output, numerics=numerics, graph=graph, seed=3, **options)
        assert bundle.manifest.parity["prefixes"] == options["window_size"]
        assert bundle.manifest.parity["max_rel"] < 1e-5


def test_param_count_is_the_references_and_inspect_shows_it(bundle: ee.Bundle) -> None:
    architecture = get_architecture(bundle.manifest.program.name)
    model = architecture.model_class(architecture.config_class(**TINY))
    assert bundle.manifest.param_count == sum(parameter.numel() for parameter in model.parameters())
    _, inspection = inspect_path(bundle.path, None, None)
    assert inspection.metadata["edifice.param_count"] == str(bundle.manifest.param_count)


def test_h3_says_how_far_its_recurrence_is_from_the_exact_one(tmp_path: Path) -> None:
    path = GOLDEN / "h3_long64.safetensors"
    kept, exact = (
        ee.build("h3", weights=path, numerics=numerics, graph="window", output=tmp_path / numerics)
        for numerics in ("edifice", "standard")
    )
    report = ee.verify(kept)
    assert kept.manifest.parity["recurrence_gap"] == report.recurrence_gap
    assert exact.manifest.parity["recurrence_gap"] is None is ee.verify(exact).recurrence_gap
    # The two graphs differ by that much on the same input: the weights have no tiny variances.
    x = np.random.default_rng(0).standard_normal((1, 64, 12)).astype(np.float32)
    models = ee.load(kept), ee.load(exact)
    gap = max(np.abs(models[0](x[:, :t]) - models[1](x[:, :t])).max() for t in range(1, 65))
    assert report.recurrence_gap is not None
    assert 1e-3 < report.recurrence_gap < 1e-1
    assert gap == pytest.approx(report.recurrence_gap, rel=1e-2)


def test_a_graph_holds_hyenas_filters_and_not_the_network_that_makes_them(tmp_path: Path) -> None:
    path = GOLDEN / "hyena_small.safetensors"
    bundle = ee.build("hyena", weights=path, graph="window", output=tmp_path / "b")
    model = onnx.load(bundle.file("window/model.onnx"))
    held = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    filters = {name: shape for name, shape in held.items() if "filters" in name}
    # The last of all is only met at the last frame.
    names = [f"blocks.{b}.filters.{f}.value" for b in (0, 1) for f in (0, 1)]
    assert filters == dict.fromkeys([*names[:-1], f"{names[-1]}.oldest_first"], (10, 16))
    assert not any(node.op_type == "Sin" for node in model.graph.node)
    # What verify compares with is the network: another one fails, though the graph is as it was.
    weights = load_file(bundle.file("weights.safetensors"))
    weights["blocks.0.filters.1.dense3.weight"] *= 1.5
    forge(bundle.path, "weights.safetensors", encode_safetensors(weights, dict(read_metadata(bundle))))
    report = ee.verify(bundle.path)
    assert not report.passed
    assert report.departure is not None
    assert report.departure.node == "blocks.0/fft_conv_1"


def read_metadata(bundle: ee.Bundle) -> dict[str, str]:
    with safe_open(bundle.file("weights.safetensors"), framework="pt") as file:
        return dict(file.metadata())


def test_more_frames_than_a_window_that_binds_are_refused(tmp_path: Path) -> None:
    """By load and run, by inspect, and by the graph itself."""
    bundle = ee.build("hyena", graph="window", output=tmp_path / "b", **TINY)
    assert bundle.manifest.graphs["window"].limits == {"sequence": (1, 7)}
    model = ee.load(bundle)
    for shape in ((8, 6), (2, 8, 6), (1, 100, 6)):
        with pytest.raises(ee.RequestError, match=f"{shape[-2]} frames, and hyena can't compute more than .* of 7"):
            model(np.zeros(shape, np.float32))
    session = onnxruntime.InferenceSession(bundle.file("window/model.onnx"))
    for length in (8, 9, 10, 15, 100):
        with pytest.raises(ORT_ERRORS, match="sequence_longer_than_window"):
            session.run(None, {"state_sequence": np.zeros((1, length, 6), np.float32)})
    assert session.run(None, {"state_sequence": np.zeros((1, 7, 6), np.float32)})[0].shape == (1, 8)
    with pytest.raises(ee.RequestError, match="at most 7 frames"):
        inspect_path(bundle.path, None, 8)


def test_numerics_can_be_chosen_against_the_weights_origin(tmp_path: Path) -> None:
    path = GOLDEN / "hymba_tinyvar.safetensors"
    standard = ee.build("hymba", weights=path, numerics="standard", graph="window", output=tmp_path / "standard")
    assert standard.manifest.program.numerics == "standard"
    _, example = load_case(path)
    found = ee.load(standard)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() > 0.1
    # The choice stays with the weights that the bundle carries.
    assert read_checkpoint(standard.file("weights.safetensors")).numerics == "standard"


@pytest.mark.slow
def test_hymba_options_that_change_the_graph(tmp_path: Path) -> None:
    for index, options in enumerate(
        (
            {"num_meta_tokens": 0},
            {"meta_propagation": True},
            {"meta_propagation": True, "num_meta_tokens": 0},
            {"embed_dim": 8},
            {"hidden_size": 15, "num_heads": 3, "num_layers": 1, "window_size": 1},
            {"state_size": 1, "num_heads": 1},
        )
    ):
        numerics = NUMERICS[index % 2]
        graph = "both" if "meta_propagation" in options else "window"
        options = {**TINY, **options}
        bundle = ee.build("hymba", output=tmp_path / str(index), numerics=numerics, graph=graph, **options)
        assert bundle.manifest.parity["prefixes"] == bundle.manifest.window_size


def test_meta_propagation_refuses_edifices_weights(tmp_path: Path) -> None:
    path = GOLDEN / "hymba_small.safetensors"
    with pytest.raises(ee.RequestError, match="meta_propagation True contradicts"):
        ee.build("hymba", weights=path, meta_propagation=True, output=tmp_path / "b")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(encode_safetensors(read_checkpoint(path).tensors, {"module": "hymba"}))
    with pytest.raises(
        ee.RequestError, match=r"meta_propagation True contradicts .* shapes say meta_propagation False"
    ):
        ee.build("hymba", weights=bare, meta_propagation=True, num_heads=4, window_size=10, output=tmp_path / "b")
    propagated = ee.build("hymba", meta_propagation=True, graph="window", output=tmp_path / "p", **TINY)
    with pytest.raises(ee.RequestError, match="meta_tokens of hymba has no counterpart in Edifice"):
        ee.to_edifice(load_file(propagated.file("weights.safetensors")), "hymba")


@pytest.mark.parametrize("options", [{"opset": 17}, {"opset": 26}, {"seed": -1}, {"tolerance": 0}, {"numerics": "x"}])
def test_requests_out_of_range_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match=next(iter(options))):
        ee.build("hymba", output=tmp_path / "b", **TINY, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, *(pytest.param(n, marks=pytest.mark.slow) for n in (19, 21, 22, 23, 24, 25))])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    bundle = ee.build("hymba", output=tmp_path / "b", opset=opset, **TINY)
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(bundle.file(graph.model))
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset


@pytest.mark.slow
@each_architecture
def test_default_options(architecture: Architecture, tmp_path: Path) -> None:
    bundle = ee.build(architecture.name, output=tmp_path / "b")
    assert bundle.manifest.program.options == architecture.config_class().options()
    assert bundle.manifest.parity["prefixes"] == 60
    assert (bundle.manifest.parity["amplified"], bundle.manifest.parity["max_rel"] < 1e-5) == (0, True)
    sizes = {name: entry.size for name, entry in bundle.manifest.files.items()}
    tests = sum(size for name, size in sizes.items() if name.endswith(".pb"))
    assert sum(sizes.values()) - tests < 1.1 * 4 * bundle.manifest.param_count


LONG = 4096


def exact_over_thousands_of_frames(bundle: ee.Bundle) -> None:
    from edifice_export.programs.reference_model import reference_of

    x = np.random.default_rng(5).standard_normal((1, LONG, 6)).astype(np.float32)
    with torch.no_grad():
        expected = reference_of(bundle).double()(torch.tensor(x).double()).numpy()
    assert np.abs(ee.load(bundle)(x) - expected).max() <= 1e-5 * np.abs(expected).max()


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "numerics", "parameter", "value"),
    [
        ("ss_transformer", "standard", "dt_proj.bias", -30),
        *(slow("ss_transformer", "standard", "dt_proj.bias", step) for step in (8, 12)),
        slow("ss_transformer", "standard", "dt_proj.bias", 20),
        slow("ss_transformer", "edifice", "dt_proj.bias", 9),
        ("ss_transformer", "edifice", "dt_proj.bias", 100),  # Edifice's softplus overflows: all of the past is kept
        ("h3", "standard", "dt_log", -12),
        slow("h3", "standard", "dt_log", -7),
        ("h3", "standard", "dt_log", -2),
        slow("hymba", "standard", "dt_proj.bias", -20),  # clipped to an end of its range, as by 20 to the other
        ("hymba", "standard", "dt_proj.bias", 20),
    ],
)
def test_models_are_exact_over_thousands_of_frames(
    name: str, numerics: str, parameter: str, value: float, tmp_path: Path
) -> None:
    """The whole model, its recurrence made to weigh: steps at both ends, decays near 0 and near 1."""
    architecture = get_architecture(name)
    model = architecture.model_class(architecture.config_class(**{**TINY, "num_layers": 1}))
    initialize(model, 3)
    with torch.no_grad():
        for own, tensor in model.named_parameters():
            if own.endswith("norm.weight"):
                tensor.fill_(1)
            elif own.endswith(parameter):
                tensor.fill_(value)
            elif own.endswith("dt_proj.weight"):
                tensor.zero_()
            elif own.endswith(("ssm.out_proj.weight", "mamba.out_proj.weight")):
                tensor.mul_(10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    given = {**untold(architecture), "window_size": 7}
    given |= {"graph": "window", "output": tmp_path / "b"}
    bundle = ee.build(name, weights=tmp_path / "w.safetensors", numerics=numerics, **given)
    exact_over_thousands_of_frames(bundle)
