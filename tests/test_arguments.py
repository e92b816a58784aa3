"""Every wrong argument of the Python API is one error that names it: types that are not its own, thrown at each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

import edifice_export as ee

X = np.ones((1, 3, TINY["embed_dim"]), np.float32)
HERE = Path(__file__)


def twice(x: torch.Tensor) -> torch.Tensor:
    """What an op does."""
    return 2 * x


GIVEN: dict[str, dict[str, Any]] = {
    "bench": {"bundle": "{bundle}"},
    "build": {"architecture": "hymba"},
    "convert": {"source": "{bundle}/weights.safetensors", "target": "{new}.nx"},
    "diagnose": {},
    "export": {"module": nn.Linear(2, 2), "args": (torch.ones(2, 2),)},
    "from_edifice": {"parameters": {}, "architecture": "h3"},
    "inspect_model": {"path": "{bundle}/window/model.onnx"},
    "load": {"bundle": "{bundle}"},
    "op": {"name": "mine::wrong", "bodies": []},
    "scaffold": {"language": "cpp", "bundle": "{bundle}", "output": "{new}"},
    "standins": {},
    "to_edifice": {"parameters": {}, "architecture": "h3"},
    "verify": {"bundle": "{bundle}"},
    "Source": {"module": nn.Linear(2, 2), "args": (torch.ones(2, 2),)},
    "Model.__call__": {},
    "Model.check_stream": {},
    "Model.run": {"inputs": {"state_sequence": X}},
    "Model.session_of": {"name": "window"},
    "Model.stream": {},
    "Stream.load": {"path": "{new}"},
    "Stream.prefill": {},
    "Stream.reset": {},
    "Stream.restore": {"snapshot": None},
    "Stream.rewind": {"frames": 0},
    "Stream.save": {"path": "{new}"},
    "Stream.snapshot": {},
    "Stream.step": {},
}
"""What each is given beside the argument that is wrong."""

WRONG = {
    "None": None,
    "int": 3,
    "float": -1.5,
    "bool": True,
    "text": "no such",
    "bytes": b"no such",
    "list": [object()],
    "dict": {3: object()},
    "array": np.ones(()),
    "tensor": torch.ones(2),
    "module": nn.Linear(1, 1),
    "class": int,
}

FITS = {
    "None": "None",
    "int": r"\b(int|float)\b",
    "float": r"\bfloat\b",
    "bool": r"\bbool\b",
    "text": r"\b(str|Path)\b",
    "array": r"np.ndarray",
    "module": r"nn.Module",
    "class": r"\b(Callable|Progress)\b",
}
"""Of a value above, what an annotation says that takes it."""

TAKES_ANY_FUNCTION = {"module": r"\b(Callable|Progress)\b"}
"""What can be called, too."""


def signature(name: str) -> inspect.Signature:
    holder, _, method = name.rpartition(".")
    return inspect.signature(getattr(getattr(ee, holder), method) if holder else getattr(ee, name))


OF_THE_MODULE = {("Source", "args", "list"), ("Source", "dynamic_shapes", "list"), ("Source", "dynamic_shapes", "dict")}
"""What is right of a source until its module is looked at."""


def cases() -> Iterator[tuple[str, str, str]]:
    for name in GIVEN:
        for parameter in signature(name).parameters.values():
            said = str(parameter.annotation)
            for kind in WRONG:
                if parameter.kind is parameter.VAR_KEYWORD and name in ("build", "convert"):
                    said = "int"  # of the option that is tried
                fits = re.search(FITS.get(kind, "^$"), re.sub(r"\[.*\]", "", said))
                fits = fits or re.search(TAKES_ANY_FUNCTION.get(kind, "^$"), said)
                if parameter.name != "self" and not fits and (name, parameter.name, kind) not in OF_THE_MODULE:
                    yield name, parameter.name, kind


def call(name: str, bundle: Path, new: Path, argument: str, value: Any) -> Any:
    """Calls a function or method with one argument that is another."""
    given = {
        key: each.format(bundle=bundle, new=new) if isinstance(each, str) else each for key, each in GIVEN[name].items()
    }
    kind = signature(name).parameters[argument].kind
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return target(name, bundle)(value, **given)
    if kind is inspect.Parameter.VAR_KEYWORD:
        names = {"build": "embed_dim", "convert": "num_heads", "op": "states"}
        return target(name, bundle)(**given, **{names.get(name, "state_sequence"): value})
    return target(name, bundle)(**{**given, argument: value})


MODELS: dict[Path, ee.Model] = {}


def target(name: str, bundle: Path) -> Callable[..., Any]:
    holder, _, method = name.rpartition(".")
    if name == "op":
        return lambda **given: ee.op(**given)(twice)
    if not holder:
        return getattr(ee, name)  # type: ignore[no-any-return]
    if bundle not in MODELS:
        MODELS[bundle] = ee.load(bundle)
    model = MODELS[bundle]
    return getattr(model if holder == "Model" else model.stream(), method)  # type: ignore[no-any-return]


def test_every_public_function_is_here() -> None:
    functions = {name for name in ee.__all__ if inspect.isfunction(getattr(ee, name))}
    for holder in (ee.Model, ee.Stream):
        methods = {name for name, each in vars(holder).items() if inspect.isfunction(each) and name[0] != "_"}
        functions |= {f"{holder.__name__}.{name}" for name in methods}
    assert functions <= GIVEN.keys()


@pytest.mark.parametrize(("name", "argument", "kind"), list(cases()))
def test_a_wrong_argument_is_named(
    name: str, argument: str, kind: str, any_bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameter = signature(name).parameters[argument]
    with pytest.raises(ee.RequestError) as caught:
        call(name, any_bundle.path, tmp_path / "new", argument, WRONG[kind])
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        argument = r"(frame|state_sequence|embed_dim|num_heads|states)"
    assert re.search(rf"\b{argument}\b", str(caught.value)), caught.value
    assert not re.search(r"(Attribute|Type|Key)Error", str(caught.value))
    assert not any(tmp_path.iterdir())


def test_a_module_in_place_of_a_name_is_told_what_takes_modules() -> None:
    with pytest.raises(ee.RequestError, match=r"got a Linear: export takes modules, edifice_export.export\("):
        ee.build(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp16", "float32", 32, None])
def test_a_precision_that_there_is_not(precision: Any) -> None:
    for act in (
        lambda: ee.build("hymba", precision=precision),
        lambda: ee.export(nn.Linear(2, 2), (torch.ones(2, 2),), precision=precision),
    ):
        with pytest.raises(ee.RequestError, match=f"precision must be fp32, got {precision!r}"):
            act()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dynamic_shapes": [3]}, "dynamic_shapes of input must be a list of names"),
        ({"dynamic_shapes": {"input": 3}}, "dynamic_shapes of input must be a list of names"),
        ({"input_names": "x"}, "input_names must be a list of texts"),
        ({"input_names": [3]}, "each of input_names must be text, got 3"),
        ({"output_names": [None]}, "each of output_names must be text"),
        ({"values": {"input": "ids"}}, "values: input must be an edifice_export.Values, got 'ids'"),
        ({"values": {"input": ee.Values("words")}}, "values: kind of input must be normal, ids, integers, mask"),
        ({"values": {"input": ee.Values("ids", 2.5)}}, "values: below of input must be an integer from 1 upward"),
        ({"args": torch.ones(2, 2)}, r"args must be a list of tensors, such as \(x,\)"),
    ],
)
def test_what_is_within_an_argument_of_export(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"args": (torch.ones(2, 2),), "output": tmp_path / "b", **said}
    with pytest.raises(ee.RequestError, match=expected):
        ee.export(nn.Linear(2, 2), **given)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("what", ["threads", "batch", "length"])
def test_an_empty_list_is_refused(what: str, any_bundle: ee.Bundle) -> None:
    with pytest.raises(ee.RequestError, match=f"{what}: the list is empty"):
        ee.bench(any_bundle, **{what: []})
