"""The whole road: builds against Edifice, from weights and from a seed, in every form a user may ask for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from golden_cases import CASES, load_case
from safetensors.torch import load_file

import edifice_export as ee
from edifice_export.checkpoints import read_checkpoint, write_safetensors
from edifice_export.checkpoints.edifice import reverse_axes, to_edifice_names
from edifice_reference.config import NUMERICS
from edifice_reference.registry import get_architecture


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_edifices_weights_give_edifices_output(path: Path, tmp_path: Path) -> None:
    bundle = ee.build(path.stem.split("_")[0], weights=path, output=tmp_path / "b")
    _, example = load_case(path)
    found = ee.load(bundle)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() < 1e-5
    assert bundle.manifest.numerics == "edifice"
    assert bundle.manifest.weights["source"] == path.name


def test_a_bundle_is_what_its_manifest_says(bundle: ee.Bundle) -> None:
    manifest = bundle.manifest
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "manifest.json"}
    assert manifest.options == get_architecture(manifest.architecture).config_class(**TINY).options()
    assert (manifest.numerics, manifest.precision, manifest.target, manifest.seed) == (
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
    assert said["edifice.architecture"] == bundle.manifest.architecture
    assert json.loads(said["edifice.options"]) == bundle.manifest.options
    assert said["edifice.window_size"] == str(TINY["window_size"])
    assert said["edifice.numerics"] == "standard"


def test_test_data_is_the_float64_references(bundle: ee.Bundle) -> None:
    from edifice_export.reference_model import reference_of

    reference = reference_of(bundle).double()
    lengths = []
    for _, inputs, outputs in bundle.test_data():
        (x,), (y,) = inputs.values(), outputs.values()
        with torch.no_grad():
            expected = reference(torch.tensor(x, dtype=torch.float64)).float().numpy()
        np.testing.assert_array_equal(y, expected)
        lengths.append(x.shape[:2])
    assert lengths == [(1, 7), (2, 4)]


def test_a_build_is_reproducible(bundle: ee.Bundle, tmp_path: Path) -> None:
    again = ee.build(bundle.manifest.architecture, output=tmp_path / "again", seed=1, **TINY)
    assert again.manifest == bundle.manifest
    other = ee.build(bundle.manifest.architecture, output=tmp_path / "other", seed=2, **TINY)
    assert other.manifest.files["weights.safetensors"] != bundle.manifest.files["weights.safetensors"]


def test_a_bundles_own_weights_build_the_same_bundle(bundle: ee.Bundle, tmp_path: Path) -> None:
    rebuilt = ee.build(
        bundle.manifest.architecture, weights=bundle.file("weights.safetensors"), seed=1, output=tmp_path / "rebuilt"
    )
    assert rebuilt.manifest.files == bundle.manifest.files
    assert rebuilt.manifest.options == bundle.manifest.options


@pytest.mark.parametrize("dotted", [False, True])
def test_edifice_names_without_metadata_take_options_from_flags(
    dotted: bool, bundle: ee.Bundle, tmp_path: Path
) -> None:
    """Edifice's own safetensors have `layer.param` names and no metadata."""
    from edifice_export.reference_model import reference_of

    model = reference_of(bundle)
    known = get_architecture(bundle.manifest.architecture)
    names = to_edifice_names(model, known)
    tensors = {
        names[name].replace("/", ".") if dotted else names[name]: reverse_axes(value, name)
        for name, value in load_file(bundle.file("weights.safetensors")).items()
    }
    write_safetensors(tmp_path / "bot.safetensors", tensors, {"unrelated": "metadata"})
    checkpoint = read_checkpoint(tmp_path / "bot.safetensors")
    assert checkpoint.is_edifice
    built = ee.build(known.name, weights=tmp_path / "bot.safetensors", output=tmp_path / "b", seed=1, **TINY)
    assert built.manifest.numerics == "edifice"
    assert built.manifest.files["window/test_data_set_0/input_0.pb"] == bundle.manifest.files[
        "window/test_data_set_0/input_0.pb"
    ]  # fmt: skip
    own, theirs = (load_file(b.file("weights.safetensors")) for b in (bundle, built))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_numerics_can_be_chosen_against_the_weights_origin(tmp_path: Path) -> None:
    path = next(path for path in CASES if "tinyvar" in path.stem)
    standard = ee.build("hymba", weights=path, numerics="standard", output=tmp_path / "standard")
    assert standard.manifest.numerics == "standard"
    _, example = load_case(path)
    found = ee.load(standard)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() > 0.1
    # The choice stays with the weights that the bundle carries.
    assert read_checkpoint(standard.file("weights.safetensors")).numerics == "standard"


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
        bundle = ee.build("hymba", output=tmp_path / str(index), numerics=numerics, **{**TINY, **options})
        assert bundle.manifest.parity["prefixes"] == bundle.manifest.window_size


def test_meta_propagation_refuses_edifices_weights(tmp_path: Path) -> None:
    path = next(path for path in CASES if "small" in path.stem)
    with pytest.raises(ee.RequestError, match="meta_propagation True contradicts"):
        ee.build("hymba", weights=path, meta_propagation=True, output=tmp_path / "b")
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, read_checkpoint(path).tensors, {"module": "hymba"})
    with pytest.raises(ee.RequestError, match="meta_tokens of Hymba has no counterpart in Edifice"):
        ee.build("hymba", weights=bare, meta_propagation=True, output=tmp_path / "b")


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edifice_export.bundle.EXTERNAL_DATA_THRESHOLD", 1000)
    bundle = ee.build("hymba", output=tmp_path / "large", **{**TINY, "hidden_size": 32})
    assert "window/model.onnx.data" in bundle.manifest.files
    assert bundle.manifest.files["window/model.onnx.data"].size > bundle.manifest.files["window/model.onnx"].size
    assert ee.verify(tmp_path / "large").passed
    (tmp_path / "large/window/model.onnx.data").write_bytes(
        b"\0" * bundle.manifest.files["window/model.onnx.data"].size
    )
    with pytest.raises(ee.CheckError, match=r"window/model.onnx.data was changed"):
        ee.load(tmp_path / "large")


def test_a_failure_with_external_data_is_diagnosed_too(
    bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edifice_export.bundle.EXTERNAL_DATA_THRESHOLD", 1000)
    large = ee.build(bundle.manifest.architecture, output=tmp_path / "large", **TINY)
    assert ee.verify(large, tolerance=1e-12).departure is not None


@pytest.mark.parametrize("options", [{"opset": 17}, {"opset": 26}, {"seed": -1}, {"tolerance": 0}, {"numerics": "x"}])
def test_requests_out_of_range_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match=next(iter(options))):
        ee.build("hymba", output=tmp_path / "b", **TINY, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 23, 25])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    bundle = ee.build("hymba", output=tmp_path / "b", opset=opset, **TINY)
    model = onnx.load(bundle.file("window/model.onnx"))
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
