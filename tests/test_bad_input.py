"""Bad input: one `error:` line with the right exit status, and nothing left behind, whatever was wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cli_helpers as helpers
import numpy as np
import pytest
import torch
from cli_helpers import REMOVED, Capture, cli, done, error_of, refused, tiny_build, unchanged
from conftest import ANY, any_architecture
from safetensors import safe_open
from safetensors.numpy import save_file

import edifice_export as ee
from edifice_export.building import assemble
from edifice_export.bundle.body_names import op_of
from edifice_export.bundle.manifest import FileEntry, GraphEntry, Manifest, ProgramEntry
from edifice_export.programs import reference_model
from edifice_export.runtime.providers import all_providers, why_not_usable
from edifice_export.specification import InputSpec, OutputSpec, Values
from edifice_reference.models.registry import ARCHITECTURES

Tensors = dict[str, np.ndarray]
MODEL, WEIGHTS, DATA = "window/model.onnx", "weights.safetensors", "window/test_data_set_0/input_0.pb"
NORM, INPUT = "final_norm.weight", "input_projection.weight"
UNUSABLE = next(short for short in all_providers() if why_not_usable(short))
OUTSIDE = ("../../x", "/etc/passwd", "window/../../x", "C:/x", "..\\x")
INTEGERS = [
    (name, field)
    for name in ARCHITECTURES
    for field in dataclasses.fields(ARCHITECTURES[name].config_class)
    if type(field.default) is int
]
OF_BUNDLE = {"verify": "verify bot", "run": "run bot --input=x.npy --output=y.npy", "inspect": "inspect bot"}
EVERYTHING = {**OF_BUNDLE, "stream": "run bot --stream --input=x.npy --output=y.npy"}
REQUESTS = {"build": " ".join(tiny_build(ANY)), **OF_BUNDLE}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder and the folder for temporary files: all that a command could leave something in."""
    helpers.trace_once(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def bot(folder: Path, any_bundle: ee.Bundle) -> Path:
    """A bundle that may be damaged, among what furnish adds."""
    helpers.furnish(any_bundle.path)
    return folder / "bot"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("build", "name an architecture"),
        ("bulid", "'bulid'.*'build'"),
        *((f"build {name}x", f"'{name}x': did you mean {name}?") for name in ARCHITECTURES),
        *((f"build {name.upper()}", f"'{name.upper()}': did you mean {name}?") for name in ARCHITECTURES),
        ("{build} --hiden-size=8", "--hiden-size.*--hidden-size"),
        ("{build} more", "more"),
        ("{build} --seed", "--seed.* requires an argument"),
        ("build hymba --hidden-size=10 --num-heads=4", "got hidden_size 10 and num_heads 4"),
        *((f"{{build}} --dropout={value}", f"to below 1, got {value}") for value in ("1.0", "-0.1", "nan", "inf")),
        ("{build} --dropout=some", "--dropout.*'some'"),
        ("{build} --hidden-size=16384 --num-layers=512", "parameters.*GiB of memory.*choose smaller options"),
        *((f"{{build}} --opset={value}", f"opset must be .* from 18 to 25, got {value}") for value in (17, 26, 10**30)),
        *((f"{{build}} --seed={value}", f"seed must be an integer from 0 to .*, got {value}") for value in (-1, 2**63)),
        *((f"{{build}} --tolerance={value}", f"tolerance must be .*{value}") for value in ("0", "nan", "-1", "inf")),
        ("{build} --numerics=exact", "--numerics.*'exact'.*standard.*edifice"),
        ("{build} --graph=frames", "--graph.*'frames'.*window.*stream.*both"),
        ("{build} --output=x.npy", "--output x.npy: is a file"),
        *((f"{{build}} --output=x.npy/{below}", "--output x.npy/.*Not a directory") for below in ("bot", "no/bot")),
        ("{build} --output=/proc/no_such/bot", "--output /proc/no_such/bot: can't write"),
        ("{build} --output=notes", "--output notes: holds files"),
        ("{build} --output=link", "--output link: is a (symbolic )?link"),
        ("{build} --output=mixed", "--output mixed: holds window/.todo"),
        ("{build} --output=mixed_link", "--output mixed_link: holds window/notes"),
        ("{build} --output=damaged", "--output damaged: holds a damaged bundle"),
        ("{build} --output=" + "x" * 300, "--output x+: .*ile name too long"),
        *((f"{{build}} --weights={path}", f"weights {path}: ") for path in ("no.safetensors", "bot", "x.txt", "x.npy")),
        *(
            (f"{command} no", "bundle no: .*no such folder")
            for command in ("verify", "run --input=x.npy --output=y.npy")
        ),
        ("inspect no", "no: .*no such"),
        *((f"verify {path}", f"bundle {path}: .*(has no manifest|is a file)") for path in ("x.txt", "notes")),
        ("inspect x.txt", "x.txt"),
        ("inspect notes", "bundle notes: .*not a bundle"),
        *((f"verify bot --tolerance={value}", f"tolerance must be.*{value}") for value in ("0", "nan", "-1", "inf")),
        *((f"inspect bot --{size}={value}", f"{size}.*{value}") for size in ("batch", "sequence") for value in (0, -1)),
        *((f"{{{command}}} --provider=gpu", "provider 'gpu' is unknown: .*cpu") for command in ("verify", "run")),
        *((f"{{{command}}} --provider={UNUSABLE}", f"usable here: {UNUSABLE}: ") for command in ("verify", "run")),
        ("{run} --input=no.npy", "no.npy does not exist"),
        ("{run} --input=bot", "bot is a folder"),
        ("{run} --input=x.txt", r"\.npy, \.npz or \.csv; x.txt has the extension '\.txt'"),
        ("{run} --input=wide.npy", r"wide.npy must be \[frames, 6\].*\[9, 12\]"),
        ("{run} --input=flat.npy", r"flat.npy must be \[frames, 6\].*\[6\]"),
        ("{run} --input=deep.npy", r"deep.npy must be \[frames, 6\].*\[1, 1, 9, 6\]"),
        ("{run} --input=double.npy", "double.npy must be native float32; it is float64"),
        ("{run} --input=nan.npy", r"\[0, 8, 0\] it is nan; give finite"),
        ("{run} --output=no/y.npy", "no/y.npy.*No such file or directory"),
        ("{run} --output=y.csv", r"y.csv has the extension '\.csv'"),
        ("{run} --output=bot", "bot"),
        ("{run} --output=x.npy", "x.npy: is the input"),
        *(
            (f"{{run}} --threads={value}", f"threads must be an integer from 1 to 1024, got {value}")
            for value in (0, -1, 99999999)
        ),
        ("{run} --optimization=fast", "all, extended, basic, none, got 'fast'"),
        *((f"{{run}} --stride={value}", f"stride must be an integer from 1 upward, got {value}") for value in (0, -1)),
    ],
)
@pytest.mark.usefixtures("bot")
def test_bad_request(capfd: Capture, arguments: str, expected: str) -> None:
    assert re.search(expected, refused(capfd, *arguments.format(**REQUESTS).split()))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        pytest.param(name, field, value, id=f"{name}-{field.name}={value}")
        for name, field in INTEGERS
        for value in (0, -1, field.metadata["maximum"] + 1, 10**30, "1.5")
        if value == "1.5" or not field.metadata["minimum"] <= value <= field.metadata["maximum"]
    ],
)
def test_bad_integer(capfd: Capture, name: str, field: dataclasses.Field[int], value: int | str) -> None:
    message = refused(capfd, *tiny_build(name, *helpers.to_flags({field.name: value})))
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    outside, not_integer = f"{field.name} must be {low} to {high}, got", f"--{field.name.replace('_', '-')}.*integer.*"
    assert re.search(f"{not_integer if value == '1.5' else outside} ?'?{value}'?", message)


def test_too_little_memory(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_model, "initialize", lambda *_: torch.empty(2**48))
    assert "memory" in refused(capfd, *tiny_build(ANY))


@any_architecture
def test_full_disk(capfd: Capture, folder: Path, bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with helpers.small_disk(folder / "disk", bundle.path, monkeypatch) as disk:
        shutil.copytree(bundle.path, disk / "bot")
        message = refused(capfd, *tiny_build(ANY, "--output=disk/bot"))
    assert "--output disk/bot: can't write there: the disk is full" in message


@pytest.mark.parametrize(
    ("locked", "mode", "arguments", "named"),
    [
        ("notes", 0o555, "{build} --output=notes/bot", "--output.* .?notes/bot"),
        ("notes", 0o000, "{build} --output=notes/bot", "--output.* .?notes/bot"),
        ("bot", 0o555, "{build}", "--output bot"),  # it can't be moved then
        ("bot", 0o000, "{build}", "--output.* .?bot"),
        ("bot", 0o000, f"{{build}} --output=new --weights=bot/{WEIGHTS}", f"weights.* .?bot/{WEIGHTS}"),
        (f"bot/{WEIGHTS}", 0o000, f"{{build}} --output=new --weights=bot/{WEIGHTS}", f"weights.* .?bot/{WEIGHTS}"),
        *((f"bot{path}", 0o000, f"{{{command}}}", "bot") for path in ("", f"/{MODEL}") for command in OF_BUNDLE),
        ("x.npy", 0o000, "{run}", "x.npy"),
        ("notes", 0o555, "{run} --output=notes/y.npy", "notes/y.npy"),
        ("notes", 0o000, "{run} --output=notes/y.npy", "notes/y.npy"),
    ],
)
@pytest.mark.usefixtures("bot")
def test_no_permission(capfd: Capture, locked: str, mode: int, arguments: str, named: str) -> None:
    with unchanged(Path.cwd()), helpers.permissions(locked, mode):
        outcome = cli(capfd, *arguments.format(**REQUESTS).split())
    assert re.search(f"{named}.*(ermission denied|not readable)", error_of(outcome))


def test_verify_of_a_bundle_that_may_only_be_read(capfd: Capture, bot: Path) -> None:
    with unchanged(bot), helpers.permissions("bot/window", 0o555):
        outcome = cli(capfd, "verify", "bot", "--tolerance=1e-12")
    assert "the first node that departs is" in error_of(outcome, status=1)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("step", ["_write_examples", "_make_graph", "_parity_of"])
def test_interrupted(capfd: Capture, bot: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bool) -> None:
    if not old:
        shutil.rmtree(bot)
    monkeypatch.setattr(assemble, step, helpers.raising(KeyboardInterrupt()))
    assert "interrupted" in refused(capfd, *tiny_build(ANY), status=130)


def with_options(**changed: Any) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda _, said: said.update(options=json.dumps(json.loads(said["options"]) | changed))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors, _: tensors.pop(NORM), rf"1 missing \({NORM}\)"),
        (lambda tensors, _: tensors.update(more=tensors[NORM]), r"1 unexpected \(more\)"),
        (lambda tensors, _: tensors.update(more=tensors.pop(NORM)), rf"1 missing \({NORM}\) and 1 unexpected \(more\)"),
        (lambda tensors, _: tensors.update({INPUT: tensors[INPUT].T.copy()}), rf"{INPUT} .*\[8, 6\] and is \[6, 8\]"),
        (
            lambda tensors, _: tensors.update({NORM: tensors[NORM].astype("i4")}),
            f"{NORM} .*float32, or .* and is int32",
        ),
        (lambda tensors, _: tensors.update({NORM: tensors[NORM].astype("f8") + 1e99}), rf"{NORM} holds 1e\+99 at"),
        (lambda tensors, _: np.put(tensors[INPUT], 7, np.nan), rf"{INPUT} holds nan at \[1, 1\]"),
        (lambda tensors, _: np.put(tensors[INPUT], 7, -np.inf), rf"{INPUT} holds -inf at \[1, 1\]"),
        (
            lambda tensors, said: [said.pop("module"), tensors.update(h3=tensors.pop(NORM))],
            r"missing .*unexpected \(h3\)",
        ),
        (lambda _, said: said.update(module="h3" if said["module"] == ANY else ANY), f"made with (h3|{ANY})"),
        (lambda _, said: said.update(module="Elsewhere"), "'Elsewhere', which is not known here; known are Edifice"),
        (lambda _, said: said.update(options="{"), "options.* not JSON"),
        (lambda _, said: said.update(options="[1]"), "options.* not a JSON object but a list"),
        (lambda _, said: said.update(numerics="exact"), "numerics.*'exact'"),
        (with_options(no_such=1), "no_such"),
        (with_options(hidden_size="8"), "hidden_size.*'8'"),
        (with_options(hidden_size=0), "hidden_size.* 0"),
        (with_options(dropout=10**400), "dropout"),
        (with_options(num_layers=1), "unexpected"),
    ],
)
def test_bad_weights(capfd: Capture, folder: Path, bundle: ee.Bundle, change: Any, expected: str) -> None:
    with safe_open(bundle.path / WEIGHTS, framework="np") as file:
        tensors, said = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, said)
    save_file(tensors, folder / WEIGHTS, said)
    message = refused(capfd, "build", bundle.manifest.program.name, "--output=bot", f"--weights={WEIGHTS}")
    assert re.search(rf"weights {WEIGHTS}: .*{expected}", message)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, None])
@any_architecture
def test_damaged_weights(capfd: Capture, folder: Path, bundle: ee.Bundle, cut: int | None) -> None:
    content = (bundle.path / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:cut] if cut is not None else bytes(range(256)) * 9)
    assert f"weights {WEIGHTS}: " in refused(capfd, *tiny_build(ANY, f"--weights={WEIGHTS}"))


DAMAGES = (functools.partial(helpers.flip, place=-1), lambda file: os.truncate(file, 100), Path.unlink)


@pytest.mark.parametrize("command", OF_BUNDLE)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((MODEL, functools.partial(helpers.flip, place=place)) for place in (0, 20_000)),
        *((MODEL, damage) for damage in DAMAGES),
        *((name, helpers.link_outside) for name in (MODEL, WEIGHTS, DATA)),
        (MODEL, lambda file: helpers.forge(file.parents[1], MODEL, b"no model")),
        *(
            ("manifest", lambda file, t=text: file.with_suffix(".json").write_text(t))
            for text in ("", "{", "[]", "[" * 10**5)
        ),
    ],
)
def test_damaged_bundle(capfd: Capture, bot: Path, command: str, name: str, damage: Callable[[Path], Any]) -> None:
    damage(bot / name)
    message = refused(capfd, *OF_BUNDLE[command].split(), status=1)
    causes = f"bundle bot: {name}", f"the path {name!r} leaves the bundle through a link", f"can't open bot/{name}"
    assert any(cause in message for cause in causes)


@pytest.mark.parametrize("name", [WEIGHTS, DATA])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_a_run_does_not_use(capfd: Capture, bot: Path, name: str, damage: Callable[[Path], Any]) -> None:
    damage(bot / name)
    for command in ("verify", "inspect"):
        assert f"bundle bot: {name}" in refused(capfd, *OF_BUNDLE[command].split(), status=1)
    model = ee.load("bot")
    with pytest.raises(ee.CheckError, match=f"bundle bot: {name}"):
        ee.verify(model.bundle)
    for stream in ([], ["--stream"]):
        done(capfd, *OF_BUNDLE["run"].split(), *stream)


Place = tuple[str | int, ...]
GRAPH: Place = ("graphs", "window")
TENSOR, OUTPUT = (*GRAPH, "inputs", 0), (*GRAPH, "outputs", 0)
OBJECTS: list[tuple[Place, type]] = [
    ((), Manifest),
    (("program",), ProgramEntry),
    (GRAPH, GraphEntry),
    (TENSOR, InputSpec),
    (OUTPUT, OutputSpec),
    ((*TENSOR, "values"), Values),
    (("files", MODEL), FileEntry),
]
PLACES: list[Place] = [
    *((*place, field.name) for place, kind in OBJECTS for field in dataclasses.fields(kind)),
    ("program", "options", "window_size"),
]
PLACES.remove((*GRAPH, "test_sequence"))  # which may be missing
OPTIONAL = (("frames",), ("reference",), ("program", "numerics"), (*TENSOR, "values", "below"), (*GRAPH, "weights"))
"""Fields that are null of some bundles, and the last two of this one."""

NUMBERS = {"kind": "normal", "below": None}
STATE, POSITION, STREAM = ("states", 0), ("states", 8, "initial"), ("graphs", "stream")
SEQUENCE = (*STREAM, "test_sequence")
BAD_STREAMS: list[tuple[Place, Any, str]] = [
    (STATE, REMOVED, "the stream graph's inputs should be"),
    (STATE, None, "a tensor of the manifest is not a JSON object"),
    (("states",), [], "the states should be those of a stream graph"),
    (("states",), {}, "'states'"),
    *(((*STATE, name), REMOVED, repr(name)) for name in ("name", "dtype", "shape")),
    *(((*STATE, name), None, repr(name)) for name in ("name", "dtype", "shape")),
    ((*STATE, "name"), "0.other", "the stream graph's inputs should be"),
    ((*STATE, "name"), "0.conv", "each once"),
    ((*STATE, "dtype"), "float99", "the type 'float99' of '0.ssm' is not float32, "),
    ((*STATE, "dtype"), "float64", "the type 'float64' of '0.ssm' is not float32, "),
    ((*STATE, "dtype"), "float16", "the state 0.ssm should be float32 or int64 or int32, and is 'float16'"),
    ((*STATE, "shape"), ["batch", 17, 16], "the stream graph's inputs should be"),
    ((*STATE, "shape"), ["batch", "state", 16], "should be [batch, sizes]"),
    ((*STATE, "shape"), [1, 16, 16], "should be [batch, sizes]"),
    ((*STATE, "shape"), ["batch", 0, 16], "positive sizes"),
    ((*STATE, "shape"), [], "should be [batch, sizes]"),
    *(
        ((*STATE, "initial"), value, "the initial value of 0.ssm should be a number or a file, and is")
        for value in (REMOVED, None, True, [0.0], {}, float("nan"), float("inf"), -1e39, 10**400)
    ),
    *(((*STATE, "initial"), path, repr(path)) for path in OUTSIDE),
    ((*STATE, "initial"), "", "is not the path of a file"),
    ((*STATE, "initial"), "stream/initial/0.ssm.pb", "'stream/initial/0.ssm.pb' is used and not listed"),
    *((POSITION, value, "the initial value of 0.position should be") for value in (-1, 0.0, 0.5, 2**63, 10**30, None)),
    (("graphs", "prefill"), REMOVED, "the graphs should be window, stream, prefill, or a part, and are window, stream"),
    (STREAM, REMOVED, "the graphs should be window, stream, prefill, or a part, and are window, prefill"),
    (("graphs", "other"), {}, "graphs 'other' lacks the field 'model'"),
    (("graphs", "prefill", "inputs", 0, "name"), "frame", "the prefill graph's inputs should be state_sequence"),
    ((*STREAM, "inputs", 0, "name"), "x", "the stream graph's inputs should be frame float32 [batch, 6], past.0.ssm"),
    ((*STREAM, "inputs", 0, "shape"), ["batch", "sequence", 6], "the stream graph's inputs should be frame"),
    ((*STREAM, "inputs", 0, "dtype"), "float16", "the stream graph's inputs should be frame float32"),
    ((*STREAM, "outputs", 0, "shape"), ["batch", "size"], "output float32 [batch, size] has a size that none of its"),
    ((*STREAM, "outputs", 0, "position"), "every", "output of the stream graph should be {'name': 'output'"),
    ((*STREAM, "inputs", 1, "values"), {"kind": "mask", "below": None}, "past.0.ssm is float32, and its values"),
    ((*STREAM, "inputs", 9, "values", "below"), 17, "past.0.position of the stream graph should be"),
    ((*STREAM, "inputs", 1), REMOVED, "the stream graph's inputs should be"),
    ((*STREAM, "outputs", 2), REMOVED, "the stream graph's outputs should be"),
    ((*STREAM, "outputs"), [], "the stream graph should have inputs and outputs"),
    ((*STREAM, "test_data"), [], "the stream graph has no test_data"),
    ((*STREAM, "test_data"), ["window/test_data_set_0"], "is used and not listed"),
    (SEQUENCE, [], "the test sequence of graphs 'stream' is not a JSON object"),
    *(((*SEQUENCE, name), REMOVED, repr(name)) for name in ("folder", "inputs", "outputs")),
    *(((*SEQUENCE, "folder"), path, repr(path)) for path in OUTSIDE),
    ((*SEQUENCE, "folder"), "stream", "'stream/input_0.pb' is used and not listed"),
    ((*SEQUENCE, "inputs"), [], "the test_sequence of the stream graph should be"),
    ((*SEQUENCE, "outputs"), [], "the test_sequence of the stream graph should be"),
    ((*SEQUENCE, "inputs", 0, "shape"), ["batch", "sequence", 7], "the test_sequence of the stream graph should be"),
    ((*SEQUENCE, "outputs", 0, "shape"), ["batch", 8], "the test_sequence of the stream graph should be"),
]
"""What is wrong with a stream's part of a manifest."""

BAD_MANIFESTS: list[tuple[Place, Any, str, Iterable[str]]] = [
    *((place, REMOVED, repr(place[-1]), OF_BUNDLE) for place in PLACES),
    *((place, None, repr(place[-1]), OF_BUNDLE) for place in PLACES if place not in OPTIONAL),
    (("frames",), None, "and frames 'sequence', for a window_size of 7", OF_BUNDLE),
    (("reference",), None, "an architecture has weights of its reference, and this one has none", OF_BUNDLE),
    (("program", "numerics"), None, "numerics None is not standard or edifice", OF_BUNDLE),
    *(
        ((*GRAPH, "limits"), {"sequence": [1, most]}, "the limits of 'sequence'", OF_BUNDLE)
        for most in (0, -5, "7", True)
    ),
    *(
        ((*GRAPH, "limits"), {"sequence": bounds}, "the limits of 'sequence'", ["run"])
        for bounds in ([0, 7], [True, 7], [-1, None], ["1", None], [8, 7], [1], [1, 2, 3], [], None, 7, {})
    ),
    ((*GRAPH, "limits"), {"other": [1, 7]}, "the window graph has limits of other", ["run"]),
    *(
        (("sizes",), {"batch": 1, "sequence": size}, "sequence", ["run"])
        for size in (0, -5, True, "7", 7.0, None, 2**21)
    ),
    *(
        (("sizes",), {"batch": 1, "sequence": 7, name: 3}, "a word", ["run"])
        for name in ("", "a b", "a + b", "2", "min(3, a)")
    ),
    *((("sizes",), sizes, "sizes should be", ["run"]) for sizes in ({}, {"sequence": 7}, {"batch": 2, "sequence": 7})),
    *((("frames",), name, "frames", ["run"]) for name in ("batch", "other", "", 7)),
    (("program", "kind"), "other", "the program's kind 'other' is not architecture or module", OF_BUNDLE),
    (("program", "kind"), "module", "a module has no options, no numerics and no reference", OF_BUNDLE),
    *(
        ((*TENSOR, "values"), values, "state_sequence is float32, and its values should not be", ["run"])
        for values in (
            NUMBERS | {"kind": "other"},
            NUMBERS | {"below": 7},
            *({"kind": kind, "below": 7} for kind in ("ids", "integers", "mask")),
        )
    ),
    *(
        (
            ("graphs", "stream", "inputs", 9, "values"),
            {"kind": "ids", "below": below},
            "past.0.position is int64",
            ["run"],
        )
        for below in (0, -1, None, 2**31 + 1, 10**30)
    ),
    ((*OUTPUT, "position"), "first", "the position of output should be every, last, whole, and is 'first'", OF_BUNDLE),
    ((*OUTPUT, "position"), "whole", "output of the window graph should be", OF_BUNDLE),
    *((place, path, repr(path), OF_BUNDLE) for place in ((*GRAPH, "model"), ("reference",)) for path in OUTSIDE),
    *(((*GRAPH, "test_data"), [path], repr(path), OF_BUNDLE) for path in OUTSIDE),
    *((("files", path), {"size": 1, "sha256": ""}, repr(path), OF_BUNDLE) for path in OUTSIDE),
    (("schema_version",), True, "'schema_version'", OF_BUNDLE),
    (("opset",), "20", "'opset'", OF_BUNDLE),
    (("versions", "torch"), 2, "'versions'", OF_BUNDLE),
    (("graphs",), {}, "the graphs should be window, ", OF_BUNDLE),
    ((*GRAPH, "inputs"), [None], "'window'", OF_BUNDLE),
    ((*TENSOR, "shape"), ["batch", -1], "-1", OF_BUNDLE),
    ((*GRAPH, "model"), "window/other.onnx", "other.onnx", OF_BUNDLE),
    ((*TENSOR, "shape"), ["batch", "sequence + " + "9" * 5000, 6], "a size that is none of batch, sequence", OF_BUNDLE),
    *((("program", "options", "window_size"), size, "window_size", OF_BUNDLE) for size in (0, -5, "7", True)),
    ((*GRAPH, "inputs"), [], "input", ("verify", "run")),
    ((*TENSOR, "name"), "other", "other", ("verify", "run")),
    ((*TENSOR, "dtype"), "float99", "float99", ("verify", "run")),
    (("program", "options", "hidden_size"), 0, "hidden_size", ["verify"]),
    (("program", "name"), "no_such", "no_such", ["verify"]),
    (("program", "numerics"), "exact", "exact", ["verify"]),
    (("parity", "tolerance"), "much", "tolerance", ["verify"]),
    *((place, value, says, ("verify", "stream")) for place, value, says in BAD_STREAMS),
]


@pytest.mark.parametrize(
    ("command", "place", "value", "expected"),
    [
        pytest.param(command, place, value, expected, id=f"{command}-{'.'.join(map(str, place))}={value!s:.60}")
        for place, value, expected, commands in BAD_MANIFESTS
        for command in commands
    ],
)
def test_bad_manifest(capfd: Capture, bot: Path, command: str, place: Place, value: Any, expected: str) -> None:
    helpers.edit_manifest(bot, place, value)
    assert re.search(f"bundle bot: .*{re.escape(expected)}", refused(capfd, *EVERYTHING[command].split(), status=1))


@pytest.mark.parametrize(
    ("body", "node"),
    [
        ("SelectiveScan_plain_6to1", "blocks.0.mamba/selective_scan"),
        ("CausalAttention_blocks_3to1", "blocks.0.attention/causal_attention"),
    ],
)
@pytest.mark.usefixtures("bot")
def test_failed_parity(capfd: Capture, monkeypatch: pytest.MonkeyPatch, body: str, node: str) -> None:
    helpers.replace_bodies(monkeypatch, op_of(body), helpers.negated)
    message = refused(capfd, *tiny_build("hymba", "--graph=window"), status=1)
    assert "hymba was not written: " in message
    assert "cases agree with the float64 reference" in message
    assert f"the first node that departs is {node} (edifice::{body}), by" in message
