"""Weights from any format into any other: every container, in both directions, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import Capture, done, refused, unchanged
from conftest import GOLDEN, TINY
from golden_cases import SMALL, load_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import edifice_export as ee
from edifice_export.weights import read_checkpoint
from edifice_export.weights.formats.nx_checkpoint import write_nx_checkpoint
from edifice_reference.models.config import Config
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda known: known.name)

CONTAINERS = sorted((GOLDEN / "containers").iterdir())
STATED = {"hymba_small_ckpt_spec.nx", "hymba_small_ckpt_zlib.nx"}
"""Those that say their options."""

WRITTEN = [
    ("bot.safetensors", None),
    ("bot.safetensors", "edifice"),
    ("bot.nx", None),
    ("bot.axon", None),
    ("bot.nxbin", None),
]


def untold(config: Config) -> dict[str, Any]:
    """The options that no tensor's shape tells, as a model has them."""
    fields = dataclasses.fields(config)
    return {field.name: getattr(config, field.name) for field in fields if field.metadata["untold"]}


def tiny_model(architecture: Architecture) -> torch.nn.Module:
    model: torch.nn.Module = architecture.model_class(architecture.config_class(**TINY))
    initialize(model, 3)
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_architecture
def test_there_and_back(architecture: Architecture) -> None:
    state = tiny_model(architecture).state_dict()
    edifice = ee.to_edifice(state, architecture.name)
    assert all(name.count("/") == 1 for name in edifice)
    back = ee.from_edifice(edifice, architecture.name)
    assert same(back, dict(state))
    again = architecture.model_class(architecture.config_class(**TINY))
    again.load_state_dict(back)


@pytest.mark.parametrize("name", SMALL)
def test_what_goes_to_edifice_is_what_edifice_has(name: str) -> None:
    """Names, layouts and bits, of a model that was loaded from Edifice's own parameters."""
    model, _ = load_case(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        theirs = {key: file.get_tensor(key) for key in json.loads(file.metadata()["param_keys"])}
    assert same(ee.to_edifice(dict(model.state_dict()), name.rpartition("_")[0]), theirs)


def test_names_that_are_nobodys_are_refused() -> None:
    with pytest.raises(ee.RequestError, match="hymba_block_1_norm/gamma is no parameter of Edifice's h3"):
        ee.from_edifice({"hymba_block_1_norm/gamma": torch.ones(1)}, "h3")
    for name in ("blocks.0.shift.weight", "blocks.x.norm.weight", "blocks.0.norm.gamma", "blocks.00.norm.weight", ""):
        with pytest.raises(ee.RequestError, match="no counterpart in Edifice"):
            ee.to_edifice({name: torch.ones(1)}, "h3")
    for name in ("h3_block_0_norm/gamma", "h3_block_01_norm/gamma", "h3_block_1_shift_ssm/h3_block_2_shift_a_log"):
        with pytest.raises(ee.RequestError, match="no parameter of Edifice"):
            ee.from_edifice({name: torch.ones(1)}, "h3")
    with pytest.raises(ee.RequestError, match="unknown architecture"):
        ee.to_edifice({}, "h4")


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_every_container_builds_edifices_model(path: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {} if path.name in STATED else {"num_heads": 4, "window_size": 10}
    bundle = ee.build("hymba", weights=path, graph="window", output=tmp_path / "b", **given)
    _, example = load_case(GOLDEN / "hymba_small.safetensors")
    found = ee.load(bundle)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() < 1e-5
    assert bundle.manifest.program.numerics == "edifice"
    assert bundle.manifest.program.options["window_size"] == 10


@pytest.mark.parametrize(("target", "names"), WRITTEN)
@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_every_container_into_every_other(path: Path, target: str, names: str | None, tmp_path: Path) -> None:
    expected = {**load_file(GOLDEN / "hymba_small.safetensors")}
    for name in ("state_sequence", "output", "output_f64"):
        del expected[name]
    done = ee.convert(path, tmp_path / target, names=names)
    assert (done.architecture, done.tensors, done.parameters) == ("hymba", 68, 13588)
    written = read_checkpoint(tmp_path / target)
    tensors = dict(written.tensors)
    assert same(tensors if written.source.name == "edifice" else ee.to_edifice(tensors, "hymba"), expected)
    assert (written.source.name == "edifice") is (names == "edifice" or not target.endswith(".safetensors"))
    assert written.numerics == "edifice"
    raw = target.endswith((".axon", ".nxbin"))
    assert done.unknown == ([] if path.name in STATED else ["num_heads"])
    assert (written.options is None) is (done.options is None) is (raw or path.name not in STATED)
    if written.options is not None:
        assert written.architecture is ARCHITECTURES["hymba"]
        assert dict(written.options) == done.options
        assert (written.options["num_heads"], written.options["window_size"]) == (4, 10)


@each_architecture
@pytest.mark.parametrize(("target", "names"), WRITTEN)
def test_what_torch_trained_goes_to_edifice_and_back(
    architecture: Architecture, target: str, names: str | None, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    given = untold(architecture.config_class(**TINY))
    ee.convert(tmp_path / "own.safetensors", tmp_path / target, names=names, **given)
    ee.convert(tmp_path / target, tmp_path / "back.safetensors", **(given if target[3:] in (".axon", ".nxbin") else {}))
    assert same(load_file(tmp_path / "back.safetensors"), dict(model.state_dict()))
    written = read_checkpoint(tmp_path / "back.safetensors")
    assert written.architecture is architecture
    assert written.options is not None
    config = architecture.config_class(**written.options)
    free = {"dropout"} | ({"window_size"} - given.keys())
    expected = architecture.config_class(**TINY)
    assert {name for name, value in config.options().items() if value != getattr(expected, name)} <= free


def test_the_command(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = GOLDEN / "containers/hymba_small.axon"
    text = done(capfd, "convert", source, "bot.nx", "--option", "num_heads=4", "--option=window-size=10").out
    assert text == "wrote bot.nx: hymba, 68 tensors, 13,588 parameters\n"
    options = read_checkpoint(Path("bot.nx")).options
    assert options is not None
    assert (options["num_heads"], options["window_size"]) == (4, 10)
    report = json.loads(done(capfd, "convert", "bot.nx", "bot.safetensors", "--architecture=hymba", "--json").out)
    assert report["options"]["num_heads"] == 4
    assert report["unknown"] == []
    words = done(capfd, "convert", source, "bare.nx").words
    assert "bare.nx states no options" in words
    assert "doesn't say num_heads; give --option num_heads=..." in words
    assert {path.name for path in tmp_path.iterdir()} == {"bot.nx", "bot.safetensors", "bare.nx"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{axon} bot.pt", "bot.pt: .pt is no format to write; name it .safetensors, .nx, .axon, .nxbin"),
        ("{axon} bot", "without a suffix"),
        ("{axon} bot.nx --names torch", "leave --names out"),
        ("{axon} bot.safetensors --names other", "names must be torch, edifice, got 'other'"),
        ("{axon} no/bot.nx", "no folder no"),
        ("{axon} folder.nx", "is a folder"),
        ("no.nx bot.nx", "weights no.nx: there is no such file"),
        ("torn.nx bot.nx", "weights torn.nx: "),
        ("pickle.pt bot.nx", "pickle.*save_file"),
        ("nobody.safetensors bot.nx", "give --architecture"),
        ("{axon} bot.nx --architecture h3", "not those of the h3 .*missing"),
        ("{axon} bot.nx --architecture h4", "unknown architecture 'h4'"),
        ("{spec} bot.nx --architecture h3", "made with hymba"),
        ("{spec} bot.nx --option num_heads=2", "num_heads 2 contradicts .*made with num_heads 4"),
        ("{axon} bot.nx --option hidden_size=32", "hidden_size 32 contradicts .*shapes say hidden_size 16"),
        ("{axon} bot.nx --option num_heads=5", "num_heads 5"),
        ("{axon} bot.nx --option num_heads=0", "num_heads must be 1 to 1024, got 0"),
        ("{axon} bot.nx --option num_heads", "NAME=VALUE"),
        ("{axon} bot.nx --option num_heads=four", "NAME=VALUE"),
        ("{axon} bot.nx --option num_heads=4 --option num-heads=4", "twice"),
        ("{axon} bot.nx --option heads=4", "unknown option 'heads' of hymba"),
        ("missing.safetensors bot.nx", "1 missing .final_norm/gamma"),
        ("more.safetensors bot.nx", "1 unexpected .hymba_block_1_norm/more"),
        ("other.safetensors bot.nx", "hymba_block_2_norm/gamma should be .16. and is .3."),
    ],
)
def test_bad_requests(
    capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    containers = GOLDEN / "containers"
    (tmp_path / "folder.nx").mkdir()
    (tmp_path / "torn.nx").write_bytes((containers / "hymba_small_ckpt_spec.nx").read_bytes()[:-1])
    Path("pickle.pt").write_bytes(pickle.dumps({}))
    save_file({"x": torch.zeros(1)}, "nobody.safetensors")
    whole = dict(read_checkpoint(containers / "hymba_small.axon").tensors)
    save_file({name: tensor for name, tensor in whole.items() if name != "final_norm/gamma"}, "missing.safetensors")
    save_file({**whole, "hymba_block_1_norm/more": torch.zeros(1)}, "more.safetensors")
    save_file({**whole, "hymba_block_2_norm/gamma": torch.zeros(3)}, "other.safetensors")
    places = {"axon": containers / "hymba_small.axon", "spec": containers / "hymba_small_ckpt_spec.nx"}

    assert re.search(expected, refused(capfd, "convert", *arguments.format(**places).split()))


def test_an_old_file_stays_when_a_conversion_fails(tmp_path: Path) -> None:
    (tmp_path / "bot.nx").write_bytes(b"old")
    with unchanged(tmp_path), pytest.raises(ee.RequestError):
        ee.convert(GOLDEN / "containers/hymba_small.axon", tmp_path / "bot.nx", num_heads=5)
    ee.convert(GOLDEN / "containers/hymba_small.axon", tmp_path / "bot.nx", num_heads=4)
    assert read_checkpoint(tmp_path / "bot.nx").options is not None


def test_meta_propagation_has_no_place_in_edifice(tmp_path: Path) -> None:
    config = ARCHITECTURES["hymba"].config_class(**TINY, meta_propagation=True)
    model = ARCHITECTURES["hymba"].model_class(config)
    initialize(model, 0)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ee.RequestError, match="meta_tokens of hymba has no counterpart in Edifice"):
        ee.convert(tmp_path / "own.safetensors", tmp_path / "bot.nx", num_heads=4)
    assert not (tmp_path / "bot.nx").exists()


@pytest.mark.parametrize("suffix", [".nx", ".axon"])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "hymba_small"])
def test_every_architecture_builds_from_every_container(name: str, suffix: str, tmp_path: Path) -> None:
    """Hymba does from Edifice's own, above."""
    model, example = load_case(GOLDEN / f"{name}.safetensors")
    architecture = name.removesuffix("_small")
    weights = tmp_path / f"bot{suffix}"
    ee.convert(GOLDEN / f"{name}.safetensors", weights)
    given = {"window_size": 10} | untold(model.config)
    stated = suffix == ".nx"
    options = {} if stated else given
    bundle = ee.build(architecture, weights=weights, graph="window", output=tmp_path / "b", **options)
    found = ee.load(bundle)(example["state_sequence"].numpy())
    assert np.abs(found - example["output"].numpy()).max() < 1e-5
    assert (bundle.manifest.program.numerics, bundle.manifest.program.options["window_size"]) == ("edifice", 10)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """What every container holds, under this project's names."""
    return ee.from_edifice(dict(read_checkpoint(CONTAINERS[0]).tensors), "hymba")


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_container_is_refused_or_read_right(
    path: Path, values: dict[str, Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    """On the whole way to a model. Raw numbers have no checksum: a change among them changes one of them."""
    content = bytearray(path.read_bytes())
    begin = 0 if data.draw(st.booleans()) else len(content) - 10_000
    if data.draw(st.integers(0, 3)) == 0:
        del content[data.draw(st.integers(begin, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(begin, min(begin + 10_000, len(content)) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    damaged, output = tmp_path / "damaged", tmp_path / "out.safetensors"
    damaged.write_bytes(content)
    output.unlink(missing_ok=True)
    refusal = ""
    try:
        ee.convert(damaged, output, architecture="hymba")
    except ee.RequestError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"weights {damaged}: ")
        assert not output.exists()
        return
    found = load_file(output)
    assert found.keys() == values.keys()
    assert sum(int((found[name] != values[name]).sum()) for name in found) <= 1


def test_nothing_is_stated_that_nobody_said(tmp_path: Path) -> None:
    """A window that a file doesn't tell may still be chosen; what it does say may not be contradicted."""
    ee.convert(GOLDEN / "h3_small.safetensors", tmp_path / "raw.axon")
    done = ee.convert(tmp_path / "raw.axon", tmp_path / "bot.safetensors")
    assert done.options is not None
    assert not {"window_size", "dropout"} & done.options.keys()
    output = tmp_path / "b"
    bundle = ee.build("h3", weights=tmp_path / "bot.safetensors", window_size=10, graph="window", output=output)
    assert bundle.manifest.program.options["window_size"] == 10
    with pytest.raises(ee.RequestError, match=r"window_size 11 contradicts .* made with window_size 10"):
        ee.build("h3", weights=GOLDEN / "h3_small.safetensors", window_size=11, output=output)
    with pytest.raises(ee.RequestError, match="order 3 contradicts"):
        ee.build("hyena", weights=GOLDEN / "hyena_small.safetensors", order=3, output=output)


def test_a_change_of_numerics_is_said(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(ARCHITECTURES["h3"])
    save_file(model.state_dict(), "own.safetensors")
    for target, said in (("bot.nx", True), ("bot.safetensors", False)):
        text = done(capfd, "convert", "own.safetensors", target).out
        assert ("Edifice computes with its own" in text) is said
    assert "Edifice computes" not in done(capfd, "convert", "bot.nx", "again.nx").out


def test_what_a_file_claims_costs_no_memory(tmp_path: Path) -> None:
    """A spec of the largest model there is, without its tensors, and names of blocks that are not there."""
    claim = {"hidden_size": 16384, "num_layers": 512, "embed_dim": 65536}
    (tmp_path / "spec.nx").write_bytes(write_nx_checkpoint({}, "h3", claim, compressed=False))
    tensors = {"blocks.511.norm.weight": torch.ones(1), "final_norm.weight": torch.ones(16384)}
    tensors["input_projection.weight"] = torch.ones(1, 65536)
    save_file(tensors, tmp_path / "names.safetensors")
    for name in ("spec.nx", "names.safetensors"):
        script = f"""
            import resource, edifice_export as ee
            for call in (lambda: ee.convert({str(tmp_path / name)!r}, {str(tmp_path / "o.nx")!r}, architecture="h3"),
                         lambda: ee.build("h3", weights={str(tmp_path / name)!r}, output={str(tmp_path / "b")!r})):
                try:
                    call()
                except ee.RequestError as error:
                    print("refused:", error)
            print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
        )
        assert result.stdout.count("refused: ") == 2
        assert "missing" in result.stdout
        assert int(result.stdout.split()[-1]) < 1200


@pytest.mark.parametrize("alias", ["obs_size", "input_dim", "input_size", "embed_size"])
def test_edifices_other_names_for_the_width(alias: str, tmp_path: Path) -> None:
    path = GOLDEN / "h3_small.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    options = json.loads(metadata["options"])
    options[alias] = options.pop("embed_dim")
    renamed = {**metadata, "options": json.dumps(options)}
    save_file(load_file(path), tmp_path / "bot.safetensors", renamed)
    assert dict(read_checkpoint(tmp_path / "bot.safetensors").options or {})["embed_dim"] == 12
    options["embed_dim"] = 13
    save_file(load_file(path), tmp_path / "bot.safetensors", {**metadata, "options": json.dumps(options)})
    with pytest.raises(ee.RequestError, match="which differ"):
        read_checkpoint(tmp_path / "bot.safetensors")
