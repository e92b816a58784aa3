"""Bundles that somebody made to read other files, to cost too much, or to be believed what their models don't say.

All are vouched for by a manifest with the right hashes. Commands run in a process of their own where time or memory is
the point, with little of both.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_helpers import COMMAND, REMOVED, Capture, done, edit_manifest, error_of, forge, refused
from cli_helpers import Outcome as Ended
from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper
from torch import nn

import edifice_export as ee
from edifice_export.bundle import outline
from edifice_export.bundle.outline import read_outline
from edifice_export.defaults import TOLERANCE
from edifice_export.errors import brief

WINDOW, STREAM, DATA, WEIGHTS = (
    "window/model.onnx",
    "stream/model.onnx",
    "window/test_data_set_0",
    "weights.safetensors",
)
COMMANDS = {
    "verify": "verify bot",
    "run": "run bot --input=x.npy --output=y.npy",
    "stream": "run bot --stream --input=x.npy --output=y.npy",
    "inspect": "inspect bot",
    "bench": "bench bot --rounds=1",
}
BOTH = ["verify", "run"]
SECONDS, MEMORY = 40, 3 * 2**30
"""Of the processor, and of addresses: what is refused takes a second, most of it for imports."""


@pytest.fixture(autouse=True)
def bot(tmp_path: Path, any_bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle to change, and a recording beside it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(any_bundle.path, "bot")
    np.save("x.npy", np.zeros((7, 6), np.float32))
    return Path("bot")


def limited(command: str) -> Ended:
    """Runs a command with little time and memory; it is killed where it takes more."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    run = subprocess.run(
        [COMMAND, *COMMANDS[command].split()], capture_output=True, text=True, check=False, preexec_fn=limit
    )
    return Ended(run.returncode, run.stdout, run.stderr)


def change_model(bot: Path, name: str, change: Callable[[ModelProto], Any]) -> None:
    """Changes a model, and the manifest's entry of it."""
    model = onnx.load(bot / name, load_external_data=False)
    change(model)
    forge(bot, name, model.SerializeToString())


# Files that are not of the bundle


def attribute(nodes: Any, kind: int = AttributeProto.TENSOR) -> AttributeProto:
    node = nodes.add(op_type="Constant", output=["unread"])
    added: AttributeProto = node.attribute.add(name="value", type=kind)
    return added


def function(model: ModelProto) -> FunctionProto:
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("edifice", "Other", ["x"], ["y"], [], opsets))
    model.functions[-1].node.append(helper.make_node("Identity", ["x"], ["y"]))
    return model.functions[-1]


def add_external(tensor: TensorProto, location: str) -> None:
    tensor.CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL))
    tensor.external_data.add(key="location", value=location)


def sparse(made: SparseTensorProto) -> TensorProto:
    made.dims.append(4)
    return made.values


PLACES: dict[str, Callable[[ModelProto], TensorProto]] = {
    "initializer": lambda model: model.graph.initializer.add(name="unread"),
    "sparse initializer": lambda model: sparse(model.graph.sparse_initializer.add()),
    "indices": lambda model: model.graph.sparse_initializer.add().indices,
    "attribute": lambda model: attribute(model.graph.node).t,
    "attributes": lambda model: attribute(model.graph.node, AttributeProto.TENSORS).tensors.add(),
    "attribute of another type": lambda model: attribute(model.graph.node, AttributeProto.INT).t,
    "sparse attribute": lambda model: sparse(attribute(model.graph.node).sparse_tensor),
    "sparse attributes": lambda model: sparse(attribute(model.graph.node).sparse_tensors.add()),
    "graph": lambda model: attribute(model.graph.node).g.initializer.add(),
    "graphs": lambda model: attribute(attribute(model.graph.node).graphs.add().node).t,
    "function": lambda model: attribute(function(model).node).t,
    "graph of a function": lambda model: attribute(function(model).node).g.initializer.add(),
    "default of a function": lambda model: function(model).attribute_proto.add(name="d", type=AttributeProto.TENSOR).t,
    "sparse default": lambda model: sparse(function(model).attribute_proto.add(name="d").sparse_tensor),
    "graph of a default": lambda model: function(model).attribute_proto.add(name="d").g.initializer.add(),
    "training": lambda model: model.training_info.add().initialization.initializer.add(),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_is_not_listed_is_not_read_wherever_it_is_named(bot: Path, place: str) -> None:
    (bot / "window/secret.bin").write_bytes(bytes(16))

    change_model(bot, WINDOW, lambda model: add_external(PLACES[place](model), "secret.bin"))
    assert "window/secret.bin" in (bot / "manifest.json").read_text()  # it is no excuse
    for read in (ee.load, ee.verify):
        with pytest.raises(ee.CheckError, match=r"window/model.onnx: it reads 'secret.bin', not a file of the bundle"):
            read(bot)


@pytest.mark.parametrize(
    "locations",
    [
        [b"../secret.bin"],
        [b"/etc/passwd"],
        [b"..\\secret.bin"],
        [b"./model.onnx.data"],
        [b"x/../model.onnx.data"],
        [b"model.onnx.data\0"],
        [b"\xffmodel.onnx.data"],
        [b"*/_ORT_MEM_ADDR_/*"],
        [b"model.onnx.data", b"model.onnx.data"],
        [b""],
        [],
    ],
)
def test_weights_are_read_from_the_one_file_beside_the_model(bot: Path, locations: list[bytes]) -> None:
    (bot / "window/model.onnx.data").write_bytes(bytes(16))
    name = "?" * 16  # Python's protobuf writes no text that is not UTF-8

    def change(model: ModelProto) -> None:
        tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
        tensor.data_location = TensorProto.EXTERNAL
        for location in locations:
            tensor.external_data.add(key="location", value=name if b"\xff" in location else location.decode())

    change_model(bot, WINDOW, change)
    forge(bot, WINDOW, (bot / WINDOW).read_bytes().replace(name.encode(), b"\xffmodel.onnx.data"))
    for read in (ee.load, ee.verify):
        with pytest.raises(ee.CheckError, match=r"window/model.onnx.*(not a file of the bundle|is not UTF-8)"):
            read(bot)


def test_a_link_is_no_way_out(bot: Path) -> None:
    Path("secret.bin").write_bytes(bytes(16))
    (bot / "window/model.onnx.data").symlink_to(Path("secret.bin").absolute())
    change_model(bot, WINDOW, lambda model: add_external(model.graph.initializer.add(), "model.onnx.data"))
    with pytest.raises(ee.CheckError, match="leaves the bundle through a link"):
        ee.load(bot)


def test_a_node_that_is_not_onnxs_is_refused(bot: Path) -> None:
    """Providers read the compiled graph of such a one from a file that an attribute names."""
    node = helper.make_node("EPContext", [], ["unread"], domain="com.microsoft", ep_cache_context="/etc/passwd")
    change_model(bot, WINDOW, lambda model: model.graph.node.append(node))
    with pytest.raises(ee.CheckError, match=r"nodes com\.microsoft::EPContext, which are not ONNX's"):
        ee.load(bot)


# What costs too much


def bomb(model: ModelProto, levels: int, calls: int, overloads: bool = False) -> None:
    """Adds functions, each of which calls the next one several times, and a node that calls the first."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edifice", 1)]
    names = ["Level" if overloads else f"Level{level}" for level in range(levels)]
    for level in range(levels):
        body = [
            helper.make_node("Identity", [f"x{i}"], [f"x{i + 1}"])
            if level == levels - 1
            else helper.make_node(names[level + 1], [f"x{i}"], [f"x{i + 1}"], domain="edifice")
            for i in range(calls)
        ]
        made = helper.make_function("edifice", names[level], ["x0"], [f"x{calls}"], body, opsets)
        if overloads:
            made.overload = str(level)
            for node in made.node:
                node.overload = str(level + 1) if node.domain else ""
        model.functions.append(made)
    call = model.graph.node.add(
        op_type=names[0], domain="edifice", input=[model.graph.input[0].name], output=["unread"]
    )
    call.overload = "0" if overloads else ""


def sparse_file(bot: Path, name: str, size: int, listed: int | None = None) -> None:
    """Makes a file of so many zeros that take no room, and a manifest that lists it."""
    (bot / name).parent.mkdir(exist_ok=True)
    (bot / name).touch()
    os.truncate(bot / name, size)
    edit_manifest(bot, ("files", name), {"size": size if listed is None else listed, "sha256": "0" * 64})


def claim_batch(bot: Path, folder: str, batch: int, real: bool) -> None:
    """Test data of a huge batch: in the header alone, or with as many zeros."""
    path = bot / folder / "input_0.pb"
    tensor = onnx.TensorProto.FromString(path.read_bytes())
    tensor.dims[0] = batch
    if real:
        tensor.raw_data = bytes(4 * int(np.prod(tensor.dims)))
    forge(bot, f"{folder}/input_0.pb", tensor.SerializeToString())


Lie = tuple[tuple[str | int, ...], Any]


def tell(bot: Path, *lies: Lie) -> None:
    """Has the manifest say other things."""
    for place, value in lies:
        edit_manifest(bot, place, value)


def window_of(size: int) -> list[Lie]:
    """Another window, of which the manifest agrees with itself."""
    return [(("program", "options", "window_size"), size), (("sizes", "sequence"), size)]


def list_many(bot: Path) -> None:
    content = json.loads((bot / "manifest.json").read_text())
    content["files"] |= {f"window/{index}": {"size": 0, "sha256": ""} for index in range(100_000)}
    (bot / "manifest.json").write_text(json.dumps(content))


def add_nodes(model: ModelProto) -> None:
    for index in range(200_001):
        model.graph.node.add(op_type="Identity", input=["state_sequence"], output=[str(index)])


COSTLY: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "functions that call each other twice": (
        lambda bot: change_model(bot, WINDOW, lambda model: bomb(model, 40, 2)),
        "window/model.onnx: it has more than 200000 nodes with functions inlined",
        ["verify", "run", "inspect", "bench"],
    ),
    "and those of a stream": (
        lambda bot: change_model(bot, STREAM, lambda model: bomb(model, 40, 2)),
        "stream/model.onnx: it has more than 200000 nodes with functions inlined",
        ["verify", "stream", "inspect"],
    ),
    "with one name and overloads": (
        lambda bot: change_model(bot, WINDOW, lambda model: bomb(model, 3, 100, overloads=True)),
        "window/model.onnx: it has more than 200000 nodes with functions inlined",
        ["run", "inspect"],
    ),
    "one after the other": (
        lambda bot: change_model(bot, WINDOW, lambda model: bomb(model, 3000, 1)),
        "window/model.onnx: it has more than 64 levels",
        ["run", "inspect"],
    ),
    "nodes": (
        lambda bot: change_model(bot, WINDOW, add_nodes),
        "window/model.onnx: it has more than 200000 nodes",
        ["run"],
    ),
    "a large file where a small one is listed": (
        lambda bot: sparse_file(bot, WINDOW, 6 * 2**30, listed=33_000),
        f"{WINDOW} was changed since it was verified: it should have 33000 bytes and has 6442450944",
        BOTH,
    ),
    "large weights where small ones are listed": (
        lambda bot: sparse_file(bot, WEIGHTS, 20 * 2**30, listed=33_000),
        f"{WEIGHTS} was changed since it was verified: it should have 33000 bytes and has 21474836480",
        ["verify", "inspect", "bench"],
    ),
    **{
        f"a large {name}": (
            functools.partial(sparse_file, name=name, size=20 * 2**30),
            f"{name}' should have 21474836480 bytes, and for this model, on this machine, it can have",
            BOTH,
        )
        for name in (WINDOW, f"{WINDOW}.data", WEIGHTS, f"{DATA}/input_0.pb", "stream/test_sequence/output_0.pb")
    },
    "a large file of no use": (
        lambda bot: sparse_file(bot, "readme.txt", 20 * 2**30),
        "files that the bundle doesn't need should have 21474836480 bytes",
        BOTH,
    ),
    "a size below zero": (
        lambda bot: edit_manifest(bot, ("files", WEIGHTS, "size"), -1),
        f"the size of '{WEIGHTS}' is -1",
        BOTH,
    ),
    "many files": (list_many, "files are listed, more than 32768", BOTH),
    "many sets of test data": (
        lambda bot: edit_manifest(bot, ("graphs", "window", "test_data"), ["window/test_data_set_0"] * 17),
        "the window graph has 17 sets of test_data, more than 16",
        BOTH,
    ),
    "a window that the models don't have": (
        lambda bot: tell(bot, *window_of(8192)),
        "the manifest says .*8192",
        BOTH,
    ),
    "a batch in the header of test data": (
        lambda bot: claim_batch(bot, "window/test_data_set_0", 10**9, real=False),
        "test data bot/window/test_data_set_0/input_0.pb should be .*, and is \\[1000000000, 7, 6\\] in 168 bytes",
        ["verify"],
    ),
    "a batch in test data": (
        lambda bot: claim_batch(bot, "window/test_data_set_0", 10**4, real=True),
        "'window/test_data_set_0/input_0.pb' should have 1680029 bytes, .* it can have 24832 at most",
        ["verify", "run"],
    ),
    "a batch in test data of a stream": (
        lambda bot: claim_batch(bot, "stream/test_data_set_0", 10**5, real=True),
        "'stream/test_data_set_0/input_0.pb' should have .* bytes, .* it can have 4672 at most",
        ["verify", "run"],
    ),
}


@pytest.mark.parametrize(
    ("command", "case"), [(command, case) for case, (_, _, commands) in COSTLY.items() for command in commands]
)
def test_what_would_cost_too_much_is_refused_before_it_does(bot: Path, command: str, case: str) -> None:
    damage, expected, _ = COSTLY[case]
    damage(bot)
    assert re.search(f"bot.*{expected}" if "bot" not in expected else expected, error_of(limited(command), status=1))


@pytest.mark.parametrize("command", ["run", "stream", "inspect"])
def test_files_that_nobody_lists_cost_nothing(bot: Path, command: str) -> None:
    for index in range(10_000):
        (bot / "window" / str(index)).touch()
    sparse_file(bot, "window/large", 6 * 2**30)
    edit_manifest(bot, ("files", "window/large"), REMOVED)
    assert limited(command).status == 0


def test_a_state_that_no_machine_holds_is_refused(bot: Path) -> None:
    size = 10**12
    for graph in ("stream", "prefill"):
        for kind in ("inputs", "outputs"):
            edit_manifest(bot, ("graphs", graph, kind, 1, "shape"), ["batch", size, 16])
    edit_manifest(bot, ("states", 0, "shape"), ["batch", size, 16])
    with pytest.raises(ee.CheckError, match=r"it can have|the states of a stream take"):
        ee.load(bot)


def test_the_outline_of_a_model_is_all_but_the_numbers_of_its_weights(bundle: ee.Bundle) -> None:
    for graph in bundle.manifest.graphs.values():
        content = bundle.file(graph.model).read_bytes()
        model, found = onnx.ModelProto.FromString(content), read_outline(memoryview(content))
        assert any(weight.raw_data for weight in model.graph.initializer)
        for weight in model.graph.initializer:
            weight.ClearField("raw_data")
        assert found == model


def test_a_model_that_is_cut_anywhere_has_no_outline_or_that_of_what_is_left(bot: Path) -> None:
    content = (bot / WINDOW).read_bytes()
    for end in range(0, len(content), 61):
        try:
            found = read_outline(memoryview(content)[:end])
        except (ValueError, DecodeError):
            continue
        left = onnx.ModelProto.FromString(content[:end])
        for weight in left.graph.initializer:
            weight.ClearField("raw_data")
        assert found == left


@pytest.mark.parametrize(
    "content", [b"\x3b\x3c", b"\x3a\x05\x0a", b"\xff" * 12, b"\x3a\xff\xff\xff\xff\x0f", b"\x09" + bytes(4)]
)
def test_what_is_no_message_has_no_outline(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"no ONNX model|ends too early"):
        read_outline(memoryview(content))


@pytest.mark.parametrize(
    "content", [b"\x08\x00" * 1001, b"\x3a\xd2\x0f" + b"\x2a\x00" * 1001, b"\x32\xe9\x07" + bytes(1001)]
)
def test_a_model_of_absurdly_many_parts_has_no_outline(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(outline, "_MAX_FIELDS", 1000)
    monkeypatch.setattr(outline, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"more than 1000 (parts|bytes)"):
        read_outline(memoryview(content))


# What the models themselves don't say


LIES: dict[str, tuple[str, list[Lie]]] = {
    "options": ("edifice.program", window_of(60)),
    "architecture": ("edifice.program", [(("program", "name"), "h3")]),
    "numerics": ("edifice.program", [(("program", "numerics"), "edifice")]),
    "precision": ("edifice.precision", [(("precision",), "fp16")]),
    "target": ("edifice.target", [(("target",), "cuda")]),
    "optimized": ("edifice.optimized", [(("optimized",), False)]),
    "inlined": ("edifice.inlined", [(("inlined",), True)]),
    "param_count": ("edifice.param_count", [(("param_count",), 10**10)]),
    "limits": ("edifice.limits", [(("graphs", "window", "limits"), {"sequence": [1, 7]})]),
}
"""Of an architecture, by what is told: the essential that doesn't agree."""

GRAPH = ("graphs", "window")
LIES_OF_MODULES: dict[str, tuple[str, list[Lie]]] = {
    "class": ("edifice.program", [(("program", "name"), "Linear")]),
    "sizes": ("edifice.sizes", [(("sizes", "time"), 2**20)]),
    "frames": ("edifice.frames", [(("frames",), "time")]),
    "ids": ("edifice.values", [((*GRAPH, "inputs", 0, "values", "below"), 2**31)]),
    "values": ("edifice.values", [((*GRAPH, "inputs", 0, "values"), {"kind": "mask", "below": None})]),
    "positions": ("edifice.positions", [((*GRAPH, "outputs", 0, "position"), "whole")]),
    "limits": ("edifice.limits", [((*GRAPH, "limits"), {"time": [2, None]})]),
}


@pytest.mark.parametrize(
    ("command", "told"),
    [*(("run", told) for told in LIES), *((command, "options") for command in ("verify", "inspect", "bench"))],
)
def test_a_manifest_is_not_believed_what_the_model_does_not_say(
    capfd: Capture, bot: Path, command: str, told: str
) -> None:
    key, lies = LIES[told]
    tell(bot, *lies)
    message = refused(capfd, *COMMANDS[command].split(), status=1)
    assert re.search(f"bundle bot: of {key} the manifest says .* and window/model.onnx itself .*; build", message)


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    torch.manual_seed(0)
    ids, free = torch.randint(5, (2, 3)), {0: "batch", 1: "time"}
    return ee.export(nn.Embedding(5, 3), (ids,), dynamic_shapes=(free,), output=tmp_path_factory.mktemp("module") / "b")


@pytest.mark.parametrize("told", LIES_OF_MODULES)
def test_nor_is_that_of_somebodys_module(of_module: ee.Bundle, told: str) -> None:
    key, lies = LIES_OF_MODULES[told]
    shutil.copytree(of_module.path, "module")
    tell(Path("module"), *lies)
    for read in (ee.load, ee.verify):
        with pytest.raises(ee.CheckError, match=f"of {key} the manifest says .* and window/model.onnx itself"):
            read("module")


@pytest.mark.parametrize("graph", ["window", "stream", "prefill"])
def test_a_model_that_says_anything_else_of_itself_is_refused(any_bundle: ee.Bundle, bot: Path, graph: str) -> None:
    """Each of what a model must say, with the manifest as it was."""
    essentials = any_bundle.manifest.essentials(graph)
    assert {key for key, _ in (*LIES.values(), *LIES_OF_MODULES.values())} == essentials.keys() - {
        *("edifice.graph", "edifice.schema_version", "edifice.states")  # which the manifest itself goes by
    }
    content = (bot / graph / "model.onnx").read_bytes()
    for key in essentials:
        forge(bot, f"{graph}/model.onnx", content)

        def change(model: ModelProto, key: str = key) -> None:
            (entry,) = (entry for entry in model.metadata_props if entry.key == key)
            entry.value += " "

        change_model(bot, f"{graph}/model.onnx", change)
        with pytest.raises(ee.CheckError, match=f"of {key} the manifest says .* and {graph}/model.onnx itself"):
            ee.verify(bot)


@pytest.mark.parametrize("initial", [1.0, 1e-30, "stream/test_data_set_0/input_1.pb"])
@pytest.mark.parametrize("command", ["verify", "stream", "inspect", "bench"])
def test_a_state_starts_where_the_model_says(capfd: Capture, bot: Path, command: str, initial: float | str) -> None:
    edit_manifest(bot, ("states", 0, "initial"), initial)
    message = refused(capfd, *COMMANDS[command].split(), status=1)
    assert re.search(
        f"bundle bot: of edifice.states the manifest says .*{initial}.* and (stream|prefill)/model", message
    )


def test_a_model_that_says_two_things_is_refused(bot: Path) -> None:
    change_model(bot, WINDOW, lambda model: model.metadata_props.add(key="edifice.optimized", value="false"))
    says = r"of edifice.optimized the manifest says true and .* itself true and false"
    with pytest.raises(ee.CheckError, match=says):
        ee.load(bot)


def test_a_model_that_says_nothing_is_refused(bot: Path) -> None:
    change_model(bot, WINDOW, lambda model: model.ClearField("metadata_props"))
    with pytest.raises(ee.CheckError, match=r"of edifice.graph the manifest says window and .* itself nothing"):
        ee.load(bot)


# What ONNX Runtime says, and what a tolerance means


def failing(bot: Path) -> None:
    """A window graph that ONNX Runtime opens and can't run."""

    def change(model: ModelProto) -> None:
        output = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["whole" if name == output else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array([10**6]), "far"))
        model.graph.node.add(op_type="Gather", input=["state_sequence", "far"], output=["nothing"])
        model.graph.node.add(op_type="ReduceSum", input=["nothing"], output=["sum"]).attribute.add(
            name="keepdims", type=AttributeProto.INT, i=0
        )
        model.graph.node.add(op_type="Add", input=["whole", "sum"], output=[output])

    change_model(bot, WINDOW, change)


@pytest.mark.parametrize("command", ["verify", "run", "bench"])
def test_a_failure_of_onnx_runtime_is_told_in_our_words(capfd: Capture, bot: Path, command: str) -> None:
    failing(bot)
    message = refused(capfd, *COMMANDS[command].split(), status=1)
    assert re.search(r"(failed on|running window on).*\[\d+, \d+, 6\].*Gather.*; (give|ask for) .*see what `", message)
    assert len(message) < 1000


def test_a_failure_on_test_data_is_told_in_our_words(capfd: Capture, bot: Path) -> None:
    claim_batch(bot, "stream/test_data_set_0", 3, real=True)
    message = refused(capfd, "verify", "bot", status=1)
    assert re.search(
        r"bot: ONNX Runtime failed on the test data in stream/test_data_set_0: .*; build the bundle", message
    )


def test_what_others_say_is_passed_on_in_part() -> None:
    assert brief(RuntimeError("short\nand more")) == "short and more"
    assert brief(RuntimeError("x" * 10_000)) == "x" * 150 + " ... " + "x" * 150
    assert brief(RuntimeError("")) == "RuntimeError"


@pytest.mark.parametrize("tolerance", [1e300, 2e-5])
@pytest.mark.parametrize("asked", [False, True])
def test_a_tolerance_that_is_no_verification_is_said_first(
    capfd: Capture, bot: Path, asked: bool, tolerance: float
) -> None:
    flags = [f"--tolerance={tolerance}"] if asked else []
    if not asked:
        edit_manifest(bot, ("parity", "tolerance"), tolerance)
    whose = "that was asked for" if asked else "in this bundle's manifest"
    value = re.escape(f"{tolerance:g}")
    said = rf"the tolerance {whose}.* is {value}, above the {TOLERANCE:g} of edifice-export: .* no verification"
    assert re.match(said, done(capfd, "verify", "bot", *flags).out)
    found = json.loads(done(capfd, "verify", "bot", "--json", *flags).out)
    assert next(iter(found)) == "loosened"
    assert re.match(said, found["loosened"])
    if not asked:
        assert re.match(said, ee.bench(bot, graph="stream", threads=[1], batch=[1], rounds=1).notes[0])


@pytest.mark.parametrize("flags", [[], [f"--tolerance={TOLERANCE}"], ["--tolerance=9e-6"]])
def test_of_the_tools_own_tolerance_nothing_is_said(capfd: Capture, flags: list[str]) -> None:
    assert done(capfd, "verify", "bot", *flags).out.startswith("graph ")
    assert json.loads(done(capfd, "verify", "bot", "--json", *flags).out)["loosened"] is None
