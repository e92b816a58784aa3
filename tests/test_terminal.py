"""What a file says reaches a terminal as text: no name in it moves the cursor, clears, hides or reorders anything."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_helpers import Capture, Outcome, cli, edit_manifest, forge
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import edifice_export as ee
from edifice_export.cli.console import print_json, print_table, say
from edifice_export.errors import printable

HOSTILE = "\x1b[2J\x1b]0;title\x07\r\u202eevil\u2066\x9b31m\x7f\u200b"
SHOWN = r"\x1b[2J\x1b]0;title\x07"
READABLE = "größe 一月 Ελλάδα 😀"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def bot(folder: Path, any_bundle: ee.Bundle) -> Path:
    shutil.copytree(any_bundle.path, folder / "bot")
    np.save("x.npy", np.zeros((9, 6), np.float32))
    return folder / "bot"


def shows(outcome: Outcome) -> str:
    """All that was printed, if it is text, and shows what is hostile in it."""
    text = outcome.out + outcome.err
    assert [line for line in text.split("\n") if not line.isprintable()] == []
    assert SHOWN in text, text
    assert "this is a bug" not in text
    return text


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with hostile names wherever it may have names of its own, but for inputs and outputs."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        node.name += HOSTILE
        for names in (node.input, node.output):
            names[:] = [name + HOSTILE if name and name not in fixed else name for name in names]
        for entry in node.metadata_props:
            entry.value += HOSTILE
    for tensor in graph.initializer:
        tensor.name += HOSTILE
    del graph.value_info[:]
    model.metadata_props.add(key=f"key{HOSTILE}", value=f"value{HOSTILE}")
    return model


def test_what_is_no_text_is_escaped_and_letters_stay() -> None:
    assert printable(f"{READABLE}{HOSTILE}") == (
        rf"{READABLE}\x1b[2J\x1b]0;title\x07\r\u202eevil\u2066\x9b31m\x7f\u200b"
    )
    assert printable("a\nb\tc\u2028d\udcff") == r"a\nb\tc\u2028d\udcff"
    for number in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0200)):
        assert printable(chr(number)).isprintable()


def test_all_that_is_printed_is_printable(capfd: Capture) -> None:
    say(HOSTILE)
    say(HOSTILE, err=True)
    print_table([("one", f"two{HOSTILE}"), (HOSTILE, "\n"), ("three", "four")])
    print_json({HOSTILE: [HOSTILE]})
    out, err = capfd.readouterr()
    shows(Outcome(0, out, err))
    assert len(out.split("\n")) == 1 + 3 + 5 + 1
    columns = [line.index(word) for line, word in zip(out.split("\n")[1:4], ("two", r"\n", "four"), strict=True)]
    assert len(set(columns)) == 1


def test_an_error_is_one_printable_line_in_python_too() -> None:
    for kind in (ee.RequestError, ee.CheckError):
        assert str(kind(f"{READABLE}:\nfound {HOSTILE}")).isprintable()
        assert str(kind(READABLE)) == READABLE


@pytest.mark.parametrize("options", [(), ("--explain",), ("--json",)])
def test_inspect_shows_names_of_a_model_escaped(capfd: Capture, bot: Path, options: tuple[str, ...]) -> None:
    forge(bot, "window/model.onnx", named(onnx.load(bot / "window/model.onnx")).SerializeToString())
    outcome = cli(capfd, "inspect", "bot/window/model.onnx", *options)
    assert (outcome.status, outcome.err) == (0, "")
    if options == ("--json",):
        assert outcome.out.isascii()
        assert f"key{HOSTILE}" in json.loads(outcome.out)["metadata"]
    else:
        shows(outcome)


def test_verify_shows_the_node_that_departs_escaped(capfd: Capture, bot: Path) -> None:
    model = onnx.load(bot / "window/model.onnx")
    product = next(node for node in reversed(model.graph.node) if node.op_type == "MatMul")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    for node in model.graph.node:
        node.name += HOSTILE
    forge(bot, "window/model.onnx", model.SerializeToString())
    outcome = cli(capfd, "verify", "bot")
    assert outcome.status == 1
    assert "the first node that departs is" in shows(outcome)


def unknown_op(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = f"Evil{HOSTILE}"


def unknown_input(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = f"evil{HOSTILE}"


@pytest.mark.parametrize("change", [unknown_op, unknown_input])
@pytest.mark.parametrize("command", ["run bot --input=x.npy --output=y.npy", "verify bot", "--debug verify bot"])
def test_what_onnxruntime_says_of_a_model_is_escaped(
    capfd: Capture, bot: Path, change: Callable[[onnx.ModelProto], None], command: str
) -> None:
    model = onnx.load(bot / "window/model.onnx")
    change(model)
    forge(bot, "window/model.onnx", model.SerializeToString())
    outcome = cli(capfd, *command.split())
    assert outcome.status == 1
    shows(outcome)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("program", "name"), f"evil{HOSTILE}"),
        (("program", "kind"), f"evil{HOSTILE}"),
        (("program", "numerics"), f"evil{HOSTILE}"),
        (("target",), f"evil{HOSTILE}"),
        (("program", "options", f"evil{HOSTILE}"), 1),
        (("frames",), f"evil{HOSTILE}"),
        (("sizes", f"evil{HOSTILE}"), 1),
        (("graphs", "window", "limits"), {f"evil{HOSTILE}": 1}),
        (("graphs", "window", "inputs", 0, "values", "kind"), f"evil{HOSTILE}"),
        (("graphs", "window", "outputs", 0, "position"), f"evil{HOSTILE}"),
        (("reference",), f"evil{HOSTILE}"),
        (("files", f"evil{HOSTILE}"), {"size": 1, "sha256": "0" * 64}),
        (("graphs", f"evil{HOSTILE}"), {}),
        (("graphs", "window", "model"), f"window/evil{HOSTILE}.onnx"),
        (("graphs", "window", "inputs", 0, "name"), f"evil{HOSTILE}"),
        (("graphs", "window", "inputs", 0, "dtype"), f"evil{HOSTILE}"),
        (("graphs", "window", "test_data"), [f"evil{HOSTILE}"]),
        (("states", 0, "name"), f"evil{HOSTILE}"),
        (("states", 0, "initial"), f"evil{HOSTILE}"),
        (("schema_version",), f"evil{HOSTILE}"),
    ],
)
@pytest.mark.parametrize("command", ["run bot --input=x.npy --output=y.npy", "inspect bot", "--debug inspect bot"])
def test_what_a_manifest_says_is_escaped(
    capfd: Capture, bot: Path, place: tuple[str | int, ...], value: Any, command: str
) -> None:
    edit_manifest(bot, place, value)
    outcome = cli(capfd, *command.split())
    text = outcome.out + outcome.err
    assert [line for line in text.split("\n") if not line.isprintable()] == []
    assert outcome.err == "" or "evil" in outcome.err or "--debug" in command


@pytest.mark.parametrize("command", ["build hymba --weights=w.safetensors --output=new", "convert w.safetensors y.nx"])
@pytest.mark.parametrize("place", ["name", "module", "options"])
def test_what_weights_say_is_escaped(capfd: Capture, bot: Path, command: str, place: str) -> None:
    tensors = load_file(bot / "weights.safetensors")
    with safe_open(bot / "weights.safetensors", framework="numpy") as file:
        said = dict(file.metadata())
    if place == "name":
        tensors[f"evil{HOSTILE}"] = np.zeros(3, np.float32)
    else:
        said[place] = json.dumps({f"evil{HOSTILE}": 1}) if place == "options" else f"evil{HOSTILE}"
    save_file(tensors, "w.safetensors", said)
    outcome = cli(capfd, *command.split())
    assert outcome.status == 2
    shows(outcome)


@pytest.mark.usefixtures("bot")
def test_paths_are_escaped_and_their_letters_stay(capfd: Capture) -> None:
    for name in (f"{READABLE}.npy", f"{READABLE}\x1b[2J\x1b]0;title\x07.npy"):
        outcome = cli(capfd, "run", "bot", f"--input={name}", "--output=y.npy")
        assert outcome.err.startswith("error: the recording must be a file; größe 一月 Ελλάδα 😀")
    shows(outcome)
    shutil.copy("x.npy", f"{READABLE}.npy")
    outcome = cli(capfd, "run", "bot", f"--input={READABLE}.npy", f"--output={READABLE}-y.npy")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"{READABLE}-y.npy" in outcome.out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", f"a,b,c,d,e,{HOSTILE}\n".encode()),
        ("x.csv", f"1,2,3,4,5,6\n1,2,3,4,5,{HOSTILE}\n".encode()),
        ("x.npy", b"\x93NUMPY\x01\x00\x36\x00{'descr': '\x1b[2J\x1b]0;title\x07', 'fortran_order': False, }  \n"),
    ],
)
@pytest.mark.usefixtures("bot")
def test_what_a_recording_says_is_escaped(capfd: Capture, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    outcome = cli(capfd, "run", "bot", f"--input={name}", "--output=y.npy")
    assert outcome.status == 2
    assert [line for line in outcome.err.split("\n") if not line.isprintable()] == []
