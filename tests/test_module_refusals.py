"""What no bundle can hold of somebody's module: refused in our words, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import Capture
from module_cases import FREE, Does, Recurs, Steps
from torch import Tensor, nn

import edifice_export as ee


def test_a_loop_over_time_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError) as error:
        ee.export(Recurs(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    message = str(error.value)
    assert "module_cases.py:" in message
    assert "for t in range(x.shape[1]):" in message
    assert "ops.linear_scan" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: {"y": x}, "Does gives a dict; return a tensor or a flat tuple"),
        (lambda x: (x, None), "Does gives a tuple; return a tensor or a flat tuple"),
        (lambda x: x.reshape(3, 3), "Does fails on its example: RuntimeError: shape"),
        (lambda x: torch.cumsum(x.half(), 1), "gives output as float16, and torch's exporter makes float32 of it"),
        (lambda x: (2 * x).half(), "gives output as float16, which is rounded by more than what readers compare to"),
        (lambda x: x.double() * 2, "the output output is float64; give one of float32"),
        (lambda x: x / 0, r"Does gives -?inf in output at \[0, 0, 0\] of an example; outputs are finite"),
    ],
)
def test_what_no_bundle_holds_is_refused(forward: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ee.ExportError, match=message):
        ee.export(Does(forward), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert not list(tmp_path.iterdir())


def test_a_name_is_an_input_or_an_output(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match="inputs and outputs are called x, x; give each a name of its own"):
        ee.export(Does(lambda x: x * 2), (torch.randn(2, 5),), output_names=["x"], output=tmp_path / "bot")


WRONG_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "no dict": ({"initial_state": lambda batch: torch.zeros(batch, 4)}, "initial_state gives no dict of tensors"),
    "no batch": ({"initial_state": lambda _: {"sum": torch.zeros(4)}}, "gives sum as float32 .4.; a state is"),
    "a name": ({"initial_state": lambda b: {"\0": torch.zeros(b, 4)}}, "give names of 1 to 98 printable letters"),
    "below zero": (
        {"initial_state": lambda b: {"sum": -torch.ones(b, 4, dtype=torch.int64)}},
        "gives sum negative integers; let it start from 0 or above",
    ),
    "half": ({"initial_state": lambda b: {"sum": torch.zeros(b, 4).half()}}, "a state is float32, int64 or int32"),
    "unlike": (
        {"initial_state": lambda b: {"sum": torch.arange(b).float()[:, None].repeat(1, 4)}},
        "another sum than initial_state.1.; entries start alike",
    ),
    "fails": ({"step": lambda x, _: x.reshape(3, 7)}, "step fails on frame 1 of the example: RuntimeError"),
    "no state": ({"step": lambda x, _: x}, "step fails on frame 1|step should give a tensor"),
    "grows": (
        {"step": lambda x, state: (x, {"sum": torch.cat([state["sum"], x], 1)})},
        r"makes of the state sum \[2, 4\] float32 \[2, 8\] float32; a state keeps its shape and type, or has one",
    ),
    "grows by two": (
        {
            "initial_state": lambda b: {"sum": torch.zeros(b, 0, 4)},
            "step": lambda x, state: (x, {"sum": torch.cat([state["sum"], x[:, None], x[:, None]], 1)}),
        },
        r"of the state sum \[2, 0, 4\] float32 \[2, 2, 4\] float32; .* a size of 0 and each step makes one longer",
    ),
    "grows no more": (
        {
            "initial_state": lambda b: {"sum": torch.zeros(b, 0, 4)},
            "step": lambda x, _: (x, {"sum": x[:, None]}),
        },
        r"of the state sum \[2, 1, 4\] float32 \[2, 1, 4\] float32; a state keeps",
    ),
    "grows both ways": (
        {"initial_state": lambda b: {"sum": torch.zeros(b, 0, 0)}},
        r"gives sum as \[1, 0, 0\]; one axis can grow, from a size of 0",
    ),
    "decides by what there is": (
        {
            "initial_state": lambda b: {"sum": torch.zeros(b, 0, 4)},
            "step": lambda x, state: (
                x + 1 if state["sum"].shape[1] == 0 else x,
                {"sum": torch.cat([state["sum"], x[:, None]], 1)},
            ),
            "extend": lambda x, state: (x, {"sum": torch.cat([state["sum"], x], 1)}),
        },
        "Steps does something else at past 0 than the graph of larger sizes: let the same code compute all of them",
    ),
    "has an end": (
        {
            "initial_state": lambda b: {"sum": torch.zeros(b, 0, 4)},
            "step": lambda x, state: (
                x + torch.eye(9, 4)[state["sum"].shape[1]],
                {"sum": torch.cat([state["sum"], x[:, None]], 1)},
            ),
        },
        "step fails on frame 10 of 13: IndexError: .*; a stream has no end: let it take any number of frames",
    ),
    "extends by one": (
        {
            "initial_state": lambda b: {"sum": torch.zeros(b, 0, 4)},
            "step": lambda x, state: (x, {"sum": torch.cat([state["sum"], x[:, None]], 1)}),
            "extend": lambda x, state: (x, {"sum": torch.cat([state["sum"], x[:, -1:]], 1)}),
        },
        r"should give present.sum float32 \[batch, past \+ time, 4\], and in .* \[batch, past \+ 1, 4\]",
    ),
    "extends wrong": (
        {"extend": lambda x, state: (torch.cumsum(x, 1), {"sum": state["sum"] + x.sum(1)})},
        "Steps was not written: .* prefill",
    ),
}


@pytest.mark.parametrize("name", list(WRONG_STEPS))
def test_steps_that_no_stream_can_take_are_refused(name: str, tmp_path: Path) -> None:
    changed, message = WRONG_STEPS[name]
    with pytest.raises(ee.ExportError, match=message):
        ee.export(Steps(**changed), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert not list(tmp_path.iterdir())


def test_steps_need_free_frames(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match=r"so that its inputs are \[batch, frames, ...\], both free"):
        ee.export(Steps(), (torch.randn(2, 5, 4),), dynamic_shapes=({0: "batch"},), output=tmp_path / "bot")


@pytest.mark.parametrize("forward", [lambda x: torch.special.erfc(x.abs() + 4), lambda x: torch.sigmoid(3 * x - 20)])
def test_small_outputs_are_held_to_their_own_size(forward: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="was not written"):
        ee.export(Does(forward), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda x: x * 2 if x.sum() > 0 else x,
            r"decides by the values that it is given, in .*test_module_refusals.py:\d+: `",
        ),
        (lambda x: x * float(x.max()), "decides by the values that it is given"),
        (lambda x: x.cumprod(1), "torch's exporter has no ONNX form of"),
        (lambda x: x.median(), "torch's exporter has no ONNX form of aten.median"),
    ],
)
def test_what_no_graph_can_say_is_told_in_our_words(
    forward: Callable[[Tensor], Tensor], message: str, tmp_path: Path, capfd: Capture
) -> None:
    with pytest.raises(ee.CheckError, match=message):
        ee.export(Does(forward), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["../../victim", "/victim", "a/b"])
def test_the_name_of_a_state_is_no_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim.pb").write_text("precious")
    steps = Steps(
        initial_state=lambda batch: {name: torch.arange(4.0).repeat(batch, 1)},
        step=lambda x, state: (state[name] + x, {name: state[name] + x}),
        extend=None,
    )
    bundle = ee.export(steps, (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert [path.name for path in tmp_path.iterdir() if path != bundle.path] == ["victim.pb"]
    assert (tmp_path / "victim.pb").read_text() == "precious"
    assert np.allclose(ee.load(bundle).stream().step(np.zeros(4, np.float32)), [0, 1, 2, 3])


def test_a_size_that_values_decide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="of a size that depends on the values that it is given"):
        ee.export(Does(lambda x: x[x > 0]), (torch.randn(2, 6),), dynamic_shapes=FREE, output=tmp_path / "bot")


def test_what_differs_from_call_to_call_is_named(tmp_path: Path) -> None:
    with pytest.raises(ee.CheckError, match="the first node that departs is rand_like"):
        ee.export(Does(lambda x: x + torch.rand_like(x)), (torch.randn(2, 6),), output=tmp_path / "bot")


@pytest.mark.parametrize("what", ["module", "args"])
def test_what_has_no_numbers_is_refused(what: str, tmp_path: Path) -> None:
    module = nn.Linear(4, 4, device="meta" if what == "module" else None)
    with pytest.raises(ee.RequestError, match="is on torch's meta device, without numbers"):
        ee.export(module, (torch.randn(2, 4, device="meta" if what == "args" else None),), output=tmp_path / "bot")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ee.RequestError, match="is a TorchScript module"):
        ee.export(torch.jit.script(nn.Linear(4, 4)), (torch.randn(2, 4),), output=tmp_path / "bot")
