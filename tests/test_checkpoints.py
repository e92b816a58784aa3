"""Weights as people have them: wrapped names, other types, torch's files, shards, a state_dict; and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import Capture, done, refused, tiny_build
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.programs.reference_model import make_empty
from edifice_export.weights import check_against, load_into, read_checkpoint, reading
from edifice_export.weights.formats import pickled, sharded
from edifice_export.weights.sources import OWN, SOURCES, Named, Source
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture

H3 = ARCHITECTURES["h3"]
CONFIG = H3.config_class(**TINY)
INDEX = "model.safetensors.index.json"
TYPES = (torch.bfloat16, torch.float16, torch.float64)


def fresh() -> nn.Module:
    model: nn.Module = H3.model_class(CONFIG)
    initialize(model, 3)
    return model


MODEL = fresh()
STATE: dict[str, Tensor] = dict(MODEL.state_dict())


def loaded(weights: Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a model that these weights were loaded into."""
    checkpoint = read_checkpoint(weights)
    model = H3.model_class(CONFIG)
    load_into(model, checkpoint, check_against(make_empty(H3, CONFIG), H3, checkpoint))
    return dict(model.state_dict())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def why(weights: Any) -> str:
    """What is said of weights that are refused."""
    with pytest.raises(ee.RequestError) as caught:
        loaded(weights)
    message = str(caught.value)
    assert message.startswith(f"weights {weights if isinstance(weights, Path) else 'state_dict'}: ")
    return message


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model.", "model._orig_mod.", "module.module.model."])
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_wrappers_put_before_names_is_left_out(prefix: str, in_memory: bool, tmp_path: Path) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in STATE.items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    weights = wrapped if in_memory else tmp_path / "w.safetensors"
    assert same(loaded(weights), STATE)
    assert read_checkpoint(weights).entry().get("prefix", "") == prefix


def test_wrappers_of_torch() -> None:
    for wrapped in (torch.compile(MODEL), nn.DataParallel(MODEL), torch.compile(nn.DataParallel(MODEL))):
        assert same(loaded(wrapped.state_dict()), STATE)


def test_a_prefix_that_not_all_have_is_part_of_the_names() -> None:
    names = list(STATE)
    some = {f"model.{name}": STATE[name] for name in names[1:]} | {names[0]: STATE[names[0]]}
    assert f"{len(names) - 1} missing" in why(some)
    assert f"{len(names) - 1} unexpected (model." in why(some)
    assert f"{len(names)} unexpected (net." in why({f"net.{name}": tensor for name, tensor in STATE.items()})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_other_types_become_float32(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    weights: Any = tmp_path / f"w{suffix}" if suffix else cast
    if suffix:
        save_file(cast, weights) if suffix == ".safetensors" else torch.save(cast, weights)
    assert same(loaded(weights), {name: tensor.float() for name, tensor in cast.items()})
    assert read_checkpoint(weights).entry()["converted"] == {str(dtype).removeprefix("torch."): len(STATE)}


def test_types_are_counted_one_by_one() -> None:
    mixed = {name: tensor.to((*TYPES, torch.float32)[index % 4]) for index, (name, tensor) in enumerate(STATE.items())}
    assert same(loaded(mixed), {name: tensor.float() for name, tensor in mixed.items()})
    found = read_checkpoint(mixed).entry()["converted"]
    assert found.keys() == {"bfloat16", "float16", "float64"}
    assert sum(found.values()) == len(STATE) - len(STATE) // 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensor: tensor.to(torch.int8), "or one of bfloat16, float16, float64, and is int8; convert it before"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.complex64), "is complex64"),
        (lambda tensor: tensor.double() + 1e300, r"holds 1e\+300 at \[0.*; give weights that are finite in float32"),
        (lambda tensor: tensor * float("nan"), r"holds nan at \[0"),
        (lambda tensor: tensor[..., :-1], r"should be \[.*\] and is \["),
    ],
)
def test_tensors_that_no_model_has(change: Callable[[Tensor], Tensor], expected: str) -> None:
    message = why({**STATE, "final_norm.weight": change(STATE["final_norm.weight"])})
    assert re.search(f"final_norm.weight .*{expected}", message)


@pytest.mark.parametrize("name", ["bot.pt", "pytorch_model.bin", "bot.pth", "last.ckpt", "bot", "bot.safetensors"])
def test_the_bytes_say_what_a_file_is(name: str, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / name) if name != "bot.safetensors" else save_file(STATE, tmp_path / name)
    assert same(loaded(tmp_path / name), STATE)


@pytest.mark.parametrize(
    "content",
    [
        OrderedDict(STATE),
        dict(MODEL.named_parameters()),
        {"state_dict": STATE},
        {"model_state_dict": STATE, "epoch": 3, "loss": 0.25},
        {"model": STATE, "optimizer": torch.optim.AdamW(MODEL.parameters()).state_dict(), "config": {"lr": 1e-3}},
        {
            "epoch": 7,
            "global_step": 4000,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": OrderedDict((f"model.{name}", tensor) for name, tensor in STATE.items()),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 8}}}},
            "callbacks": {},
            "optimizer_states": [torch.optim.AdamW(MODEL.parameters()).state_dict()],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"hidden_size": 8, "lr": 1e-3},
        },
    ],
    ids=["ordered", "parameters", "state_dict", "model_state_dict", "model", "lightning"],
)
def test_what_training_scripts_save(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "bot.ckpt")
    assert same(loaded(tmp_path / "bot.ckpt"), STATE)


class Runs:
    """What a pickle can do to whoever reads it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


PICKLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (
        lambda path: torch.save({"state_dict": STATE, "callbacks": Runs()}, path),
        r"its pickle asks for \w+\.mkdir, and nothing that a file names is run; .* state_dict\(\) alone",
    ),
    "options": (
        lambda path: torch.save({"state_dict": STATE, "hyper_parameters": Namespace(lr=1)}, path),
        "its pickle asks for argparse.Namespace, and",
    ),
    "module": (lambda path: torch.save(MODEL, path), r"its pickle asks for edifice_reference.* and \d+ more, and"),
    "old": (
        lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
        "is a pickle as torch wrote it before 1.6",
    ),
    "plain": (lambda path: path.write_bytes(pickle.dumps(Runs())), "is a pickle .* which can run code"),
    "script": (
        lambda path: torch.jit.trace(nn.Linear(2, 2), torch.ones(2, 2)).save(str(path)),
        "is TorchScript, which is a program",
    ),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, and should hold"),
    "list": (lambda path: torch.save([torch.ones(3)], path), "holds a list, and should hold"),
    "two": (lambda path: torch.save({"state_dict": STATE, "model": STATE}, path), "below state_dict and model; save"),
    "epoch": (lambda path: torch.save({**STATE, "epoch": 3}, path), r"epoch is a int and no tensor"),
    "numbers": (lambda path: torch.save({3: torch.ones(3)}, path), "holds something under 3, and names are text"),
    "sparse": (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "a is sparse, quantized, nested or"),
    "repeated": (lambda path: torch.save({"a": torch.ones(1).expand(2**40)}, path), r"a is \[1099511627776\] over 4 b"),
    "nothing": (lambda path: path.write_bytes(b""), "the file is empty"),
    "short": (
        lambda path: (torch.save(STATE, path), os.truncate(path, path.stat().st_size - 9)),
        "damaged, truncated or not of torch.save",
    ),
    "flipped": (lambda path: damaged(path), "is not what its checksum says; copy or save the file again"),
    "zip": (
        lambda path: repacked(path, lambda entry: entry.replace("data.pkl", "x")),
        "a zip archive and not of torch",
    ),
    "deflated": (
        lambda path: repacked(path, method=zipfile.ZIP_DEFLATED),
        "is compressed, which torch.save never does",
    ),
    "memory": (
        lambda path: repacked(path, content=b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + b"\xff" * 5 + b"\x7f\x85R."),
        "torch.load refuses it: ",
    ),
    "more": (
        lambda path: repacked(path, change=lambda data: data.replace(b"M,\x01", b"J" + (2**30).to_bytes(4, "little"))),
        "torch.load refuses it: ",
    ),
    "nested": (lambda path: repacked(path, content=b"\x80\x02" + b"]" * 10**5 + b"."), "holds a list, and should"),
}


def damaged(path: Path) -> None:
    """A file with one bit of its numbers flipped."""
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["input_projection.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def repacked(
    path: Path,
    rename: Callable[[str], str] = str,
    method: int = zipfile.ZIP_STORED,
    content: bytes | None = None,
    change: Callable[[bytes], bytes] = bytes,
) -> None:
    """A file of torch.save with other entries, or another pickle, and right checksums."""
    torch.save({"a": torch.ones(300)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            pickled = name.endswith("data.pkl")
            archive.writestr(rename(name), (content or change(data)) if pickled else data)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_more_than_tensors_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = PICKLES[name]
    make(tmp_path / "bot.pt")
    assert re.search(expected, why(tmp_path / "bot.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["bot.pt"]


def test_a_pickle_without_end_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "bot.pt")
    monkeypatch.setattr(pickled, "_MAX_PICKLE", 1000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    assert "has a pickle of more than 1000 bytes beside its numbers" in why(tmp_path / "bot.pt")


def test_files_larger_than_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(STATE, tmp_path / "bot.pt")
    save_file(STATE, tmp_path / "bot.safetensors")
    shards(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("it was read"))
    # Of the shards, none alone is too large.
    largest = max(path.stat().st_size for path in tmp_path.glob("model-*"))
    monkeypatch.setattr(reading, "physical_memory", lambda: largest + 1)
    for name in ("bot.pt", "bot.safetensors", INDEX):
        assert "of memory; use a larger one" in why(tmp_path / name)


def shards(folder: Path, count: int = 3, metadata: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """The weights in several files, and their index."""
    names, places = sorted(STATE), {}
    for index in range(count):
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        save_file(
            {name: STATE[name] for name in names[index::count]},
            folder / file,
            metadata[index] if metadata else {"format": "pt"},
        )
        places |= dict.fromkeys(names[index::count], file)
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(content, indent=2))
    return content


@pytest.mark.parametrize("place", [INDEX, ""])
def test_shards_are_one_checkpoint(place: str, tmp_path: Path) -> None:
    shards(tmp_path)
    assert same(loaded(tmp_path / place), STATE)
    entry = read_checkpoint(tmp_path / place).entry()
    assert entry["source"] == INDEX
    assert len(entry["shards"]) == 3
    assert all(len(each) == 64 for each in (entry["sha256"], *entry["shards"].values()))


def test_shards_may_state_their_model(tmp_path: Path) -> None:
    said = {"module": "h3", "options": json.dumps(CONFIG.options())}
    shards(tmp_path, 2, [said, said])
    assert read_checkpoint(tmp_path).options == CONFIG.options()
    shards(tmp_path, 2, [said, {"module": "hymba"}])
    assert "-00002-of-00002.safetensors: says another module than the shards before" in why(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_is_the_file_in_it(name: str, tmp_path: Path) -> None:
    assert f"is a folder without {INDEX}, model.safetensors, pytorch_model.bin" in why(tmp_path)
    save_file(STATE, tmp_path / name) if name == "model.safetensors" else torch.save(STATE, tmp_path / name)
    assert same(loaded(tmp_path), STATE)
    assert read_checkpoint(tmp_path).entry()["source"] == name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            ({"final_norm.weight": file}, f"has final_norm.weight in {re.escape(repr(file))}; shards are files beside")
            for file in ("../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "c:d", "a\0b", 3, None, ["x"])
        ),
        ({"final_norm.weight": "other.safetensors"}, "there is no other.safetensors beside it; copy all shards"),
        ({"final_norm.weight": "folder"}, "there is no folder beside it"),
        (
            {"final_norm.weight": "model-00001-of-00003.safetensors"},
            "safetensors (lacks|has) final_norm.weight, and the",
        ),
        ({"more": "model-00002-of-00003.safetensors"}, "lacks more, and the index has it there; copy all again"),
        ({"torn": "torn.safetensors"}, "torn.safetensors: damaged, truncated or not safetensors"),
    ],
)
def test_an_index_names_what_is_beside_it(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "torn.safetensors").write_bytes(b"x" * 20)
    save_file(STATE, tmp_path / "x.safetensors")
    content = shards(folder)
    content["weight_map"] |= change
    (folder / INDEX).write_text(json.dumps(content))
    assert re.search(expected, why(folder / INDEX))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"weight_map": {"a": "b"}', "is JSON, as an index of shards, and damaged"),
        ('{"a":' * 10**5, "is JSON, as an index of shards, and damaged"),
        ('{"weight_map": []}     ', "is JSON and no index of safetensors: it has no weight_map"),
        ('{"weight_map": {}}     ', "is JSON and no index of safetensors: it has no weight_map"),
        ('{"model": {"type": "BPE"}}', "is JSON and no index of safetensors: it has no weight_map"),
        ("  \n{}", "is JSON and no index"),
    ],
)
def test_json_that_is_no_index(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / INDEX).write_text(text)
    assert expected in why(tmp_path / INDEX)
    monkeypatch.setattr(sharded, "_MAX_INDEX", 2)
    assert "is an index of more than 2 bytes" in why(tmp_path / INDEX)


def test_a_state_dict_says_what_it_holds() -> None:
    entry = read_checkpoint(STATE).entry()
    assert entry == {"source": "state_dict", "sha256": entry["sha256"]}
    turned = dict(reversed(STATE.items()))
    assert read_checkpoint(turned).entry() == entry
    name = next(iter(STATE))
    for other in (
        {**STATE, name: STATE[name] + 1},
        {**STATE, name: STATE[name].reshape(-1)},
        {**STATE, name: STATE[name].double()},
        {**STATE, "more": torch.ones(0)},
    ):
        assert read_checkpoint(other).entry()["sha256"] != entry["sha256"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": np.ones(3)}, "a is a ndarray and no tensor"),
        ({"a": torch.ones(3, device="meta")}, "without data"),
        ({("a",): torch.ones(3)}, "names are text"),
        ({}, "missing"),
    ],
)
def test_a_mapping_of_something_else_is_refused(weights: Any, expected: str) -> None:
    assert expected in why(weights)


def test_a_bundle_is_built_of_a_state_dict(tmp_path: Path) -> None:
    bundle = ee.build("h3", weights=MODEL.state_dict(), window_size=7, graph="window", output=tmp_path / "b")
    assert bundle.manifest.weights == read_checkpoint(STATE).entry()
    assert bundle.manifest.program.numerics == "standard"
    assert same(load_file(bundle.file("weights.safetensors")), STATE)
    assert same(dict(MODEL.state_dict()), fresh().state_dict())


def test_build_says_what_was_done_to_weights(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = {f"model._orig_mod.{name}": tensor.bfloat16() for name, tensor in STATE.items()}
    torch.save({"state_dict": half}, "last.ckpt")
    text = done(capfd, *tiny_build("h3", "--weights=last.ckpt", "--graph=window")).out
    line = f"weights: names without the model._orig_mod. that all begin with, {len(STATE)} bfloat16 tensors upcast to "
    assert line + "float32\n" in text
    weights = json.loads(Path("bot/manifest.json").read_text())["weights"]
    assert weights.keys() == {"source", "sha256", "prefix", "converted"}
    assert (weights["source"], weights["prefix"], weights["converted"]) == (
        "last.ckpt",
        "model._orig_mod.",
        {"bfloat16": len(STATE)},
    )
    assert same(
        load_file("bot/weights.safetensors"), {name: tensor.bfloat16().float() for name, tensor in STATE.items()}
    )


def test_convert_takes_them_too(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({f"module.{name}": tensor.double() for name, tensor in STATE.items()}, "bot.pt")
    text = done(capfd, "convert", "bot.pt", "bot.nx").words
    assert f"weights: names without the module. that all begin with, {len(STATE)} float64 tensors rounded to" in text
    assert same(loaded(Path("bot.nx")), STATE)
    assert "bot.pt: .pt is no format to write" in refused(capfd, "convert", "bot.nx", "bot.pt")


class Shouted(Source):
    """Somebody's names in capitals, and matrices the other way round."""

    name = "shouted"
    numerics = "standard"
    leaves_out_defaults = False

    def read(self, names: Sequence[str]) -> Named | None:
        return Named({name: name for name in names}) if all(name.isupper() for name in names) else None

    def filed(self, theirs: str) -> str:
        return theirs

    def titles(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.name.upper(),)

    def theirs(self, own: str, architecture: Architecture) -> str:  # noqa: ARG002
        return own.upper()

    def own(self, theirs: str, architecture: Architecture) -> str | None:  # noqa: ARG002
        return theirs.lower()

    def knows(self, theirs: str, architecture: Architecture) -> bool:
        return OWN.knows(theirs.lower(), architecture)

    def lay_out(self, tensor: Tensor, own: str) -> Tensor:  # noqa: ARG002
        return tensor.mT if tensor.ndim == 2 else tensor


def test_a_source_is_one_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recognised, read, and written."""
    monkeypatch.setitem(SOURCES, "shouted", Shouted())
    lower = {name: tensor for name, tensor in STATE.items() if name == name.lower()}
    assert lower.keys() == STATE.keys()
    save_file(STATE, tmp_path / "own.safetensors")
    ee.convert(tmp_path / "own.safetensors", tmp_path / "theirs.safetensors", names="shouted", window_size=7)
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert theirs.keys() == {name.upper() for name in STATE}
    assert torch.equal(theirs["INPUT_PROJECTION.WEIGHT"], STATE["input_projection.weight"].mT)
    assert read_checkpoint(tmp_path / "theirs.safetensors").architecture is H3
    assert same(loaded(tmp_path / "theirs.safetensors"), STATE)
    torch.save(theirs, tmp_path / "bare.pt")  # which states nothing
    ee.convert(tmp_path / "bare.pt", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), STATE)
