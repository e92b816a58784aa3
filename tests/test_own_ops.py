"""Ops of a user's own: one decorated function in one file, from a module to a graph; and what is refused.

What all ops are tested for, the strangers' in tests/strangers are too: see op_cases.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset
from op_pages import MARK, PAGE, generated
from strangers.leaky_scan import LeakyFrame, LeakyLoop, leaky_scan
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.building.link import link
from edifice_export.graph.capture import export_program
from edifice_export.graph.trace import trace
from edifice_export.inspection.report import explain
from edifice_export.lowerings import HELPERS, LOWERINGS
from edifice_export.lowerings.blocked_scan import BlockedScan
from edifice_export.lowerings.domain import EDIFICE
from edifice_export.passes import optimize
from edifice_export.specification import InputSpec, TensorSpec, Values, shape_of
from edifice_export.verification.locate import first_departure
from edifice_export.verification.report import Given
from edifice_reference import ops
from edifice_reference.ops.op import plain_definitions

MINE = Opset("mine", 1)
X = InputSpec("x", "float32", shape_of("batch", "sequence", 4))


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """What a test registers is gone after it."""
    with mock.patch.dict(LOWERINGS), mock.patch.dict(HELPERS):
        yield


class Layers(nn.Module):
    """The stranger's scan between ours and dense layers; the last frame is the output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dense, self.read = (nn.Parameter(torch.randn(4, 4, generator=generator) / 2) for _ in range(2))
        self.decay = nn.Parameter(torch.rand(4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = leaky_scan(x @ self.dense, self.decay, torch.tanh(x))
        y, _ = ops.linear_scan(y, -torch.abs(y))
        y, _ = leaky_scan(y @ self.dense, self.decay, y @ self.read, gain=0.5)
        return y[:, -1]


def assert_agree(model: onnx.ModelProto, module: nn.Module, **integers: Callable[[int, int], Tensor]) -> None:
    """At sizes that were never traced, with the module in float64."""
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 8), (2, 70), (1, 300)):
        x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length))
        others = {name: draw(batch, length) for name, draw in integers.items()}
        (found,) = session.run(None, {name: value.numpy() for name, value in {"x": x, **others}.items()})
        with torch.no_grad():
            wanted = module.double()(x.double(), *others.values()).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def traced() -> ir.Model:
    model = trace(Layers(), [X], [TensorSpec("y", "float32", shape_of("batch", 4))], 20)
    optimize(model)
    return model


@pytest.mark.parametrize(
    ("length", "lowering", "why"), [(None, "loop", "any number of frames"), (20, "powers", "20 frames, at most 32")]
)
def test_a_strangers_op_is_traced_rewritten_linked_run_and_explained(
    tmp_path: Path, length: int | None, lowering: str, why: str
) -> None:
    model = traced()
    first, second = (node for node in model.graph if node.domain == "mine")
    assert [node.op_type for node in (first, second)] == ["LeakyScan"] * 2
    # Of the last layer one frame is read out, which is all that is computed of what reads it out.
    reads = [node.inputs[2].shape for node in (first, second) if node.inputs[2] is not None]
    assert [shape[1] for shape in reads if shape is not None] == ["sequence", 1]
    linked = link(model, {} if length is None else {"sequence": length})
    assert_agree(linked, Layers())
    onnx.save(linked, tmp_path / "model.onnx")
    found = [entry for entry in explain(tmp_path / "model.onnx") if entry["op"] == "LeakyScan"]
    assert [(entry["lowering"], entry["why"]) for entry in found] == [(lowering, why)] * 2
    assert {node.op_type for node in linked.graph.node if node.domain == "mine"} == {found[0]["body"]}


def test_its_departure_from_the_definition_is_found(tmp_path: Path) -> None:
    linked, module = link(traced()), Layers().double()
    wrong = [node for node in linked.graph.node if node.domain == "mine"][1]
    (gain,) = wrong.attribute
    gain.f *= 2
    onnx.save(linked, tmp_path / "model.onnx")
    graph = SimpleNamespace(inputs=[X], outputs=[TensorSpec("y", "float32", shape_of("batch", 4))], model="model.onnx")
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(graphs={"window": graph}, opset=20), file=lambda name: tmp_path / name
    )
    reference: Any = SimpleNamespace(feeds=lambda _, given: given.inputs, module=lambda _: module)
    x = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
    departure = first_departure(bundle, reference, Given({"x": x}), "window", "cpu", 1e-5)
    assert departure is not None
    assert (departure.node, departure.op_type) == (wrong.name, f"mine::{wrong.op_type}")
    gain.f /= 2
    onnx.save(linked, tmp_path / "model.onnx")
    assert first_departure(bundle, reference, Given({"x": x}), "window", "cpu", 1e-5) is None


def test_alternatives_see_its_definition() -> None:
    fixed = InputSpec("x", "float32", shape_of(2, 5, 4))

    def has_op() -> bool:
        return any("mine" in str(node.target) for node in export_program(Layers(), [fixed]).graph.nodes)

    with plain_definitions():
        assert not has_op()
    assert has_op()


@script(MINE, default_opset=op)
def SumSince(x, resets):  # noqa: N802
    """By a function of this project's own domain."""
    kept = op.Unsqueeze(op.CastLike(op.Equal(resets, op.Constant(value_int=0)), x), op.Constant(value_ints=[2]))
    nothing = op.CastLike(op.Constant(value_floats=[0.0]), x)
    start = op.Expand(op.Unsqueeze(nothing, op.Constant(value_ints=[0])), op.Shape(x, start=2, end=3))
    return BlockedScan(op.Expand(kept, op.Shape(x)), x, start)


def sum_since(x: Tensor, resets: Tensor) -> Tensor:
    """The sum of the frames since the last that is not 0 in resets, that one included."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.where(resets[:, t, None] == 0, h, 0) + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def test_an_op_of_integers_whose_body_calls_a_function_of_another_domain() -> None:
    total = ee.op("mine::sum_since", bodies=[SumSince], streamed=["x", "resets"], integers=["resets"])(sum_since)

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, resets: Tensor) -> Tensor:
            return total(x * self.scale, resets)

    resets = InputSpec("resets", "int64", shape_of("batch", "sequence"), Values("integers", 2))
    linked = link(trace(Sums(), [X, resets], [TensorSpec("y", "float32", X.shape)], 20))
    assert {entry.domain: entry.version for entry in linked.opset_import} == {"": 20, "mine": 1, "edifice": 1}
    drawn = torch.Generator().manual_seed(0)
    assert_agree(linked, Sums(), resets=lambda *size: torch.randint(3, size, generator=drawn))


SOURCE = """
import edifice_export as ee
from onnxscript import opset18 as op, script
from onnxscript.values import Opset
from torch import Tensor

@script(Opset("mine", 1), default_opset=op)
def Helper(x):
    return x + x

@script(Opset("mine", 1), default_opset=op)
def Twice(x):
    return Helper(x)

@ee.op("mine::twice", bodies=[Twice], streamed=["x"], sees=1)
def twice(x: Tensor) -> Tensor:
    return FACTOR * x
"""


def loaded(file: Path, factor: int) -> ModuleType:
    """A module of a file that is run once more."""
    file.write_text(SOURCE.replace("FACTOR", str(factor)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: module}):  # where onnxscript looks for it
        spec.loader.exec_module(module)
    return module


def test_a_file_may_be_loaded_again_and_another_may_not_take_its_name(tmp_path: Path) -> None:
    first = loaded(tmp_path / "first.py", 2)
    again = loaded(tmp_path / "first.py", 3)
    assert LOWERINGS["mine::Twice"].declared is again.twice
    assert first.twice(torch.ones(1, 1, 1)) == again.twice(torch.ones(1, 1, 1)) == 3
    with pytest.raises(ee.RequestError, match=r"mine::twice is registered already, by twice in .*first\.py; give one"):
        loaded(tmp_path / "second.py", 4)
    assert again.twice(torch.ones(1, 1, 1)) == 3


@script(MINE, default_opset=op)
def Doubled(x):  # noqa: N802
    return x + x


@script(MINE, default_opset=op)
def Scaled(x, scale: float):  # noqa: N802
    return x * op.CastLike(op.Constant(value_float=scale), x)


@script(MINE, default_opset=op)
def LastFrames(x):  # noqa: N802
    return op.Identity(x)


@script(MINE, default_opset=op)
def CallsAnothersName(x):  # noqa: N802
    return LastFrames(x)


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def scanned(x: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    del initial
    return 2 * x, 2 * x[:, -1]


def required(x: Tensor, gate: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    del gate, initial
    return 2 * x, 2 * x[:, -1]


def flagged(x: Tensor, reverse: bool) -> Tensor:
    return 2 * x.flip(1) if reverse else 2 * x


def by_name(x: Tensor, *, scale: float) -> Tensor:
    return scale * x


def unannotated(x):  # type: ignore[no-untyped-def]
    return 2 * x


def shapes(x: Tensor, *_: Any) -> Any:
    return x.shape, (x.shape[0], x.shape[2])


REFUSED: dict[str, tuple[str, Callable[..., Any], dict[str, Any], str]] = {
    "no bodies": ("mine::a", doubled, {"bodies": []}, r"mine::a has no bodies; give at least one"),
    "no body": ("mine::a", doubled, {"bodies": [doubled]}, r"is no body; give functions that are decorated"),
    "other inputs": ("mine::a", scanned, {"bodies": [LeakyFrame], "states": ["initial"], "streamed": ["x"],
        "shapes": shapes}, r"LeakyFrame takes \(x, decay, c, initial\); the op has \(x\) or \(x, initial\)"),
    "fewer inputs": ("mine::a", required, {"bodies": [Doubled], "states": ["initial"], "streamed": ["x"],
        "shapes": shapes}, r"Doubled takes \(x\); the op has \(x, gate\) or \(x, gate, initial\)"),
    "fewer outputs": ("mine::a", scanned, {"bodies": [Doubled], "states": ["initial"], "streamed": ["x"],
        "shapes": shapes}, "Doubled gives 1 outputs; the op has 2"),
    "other attributes": ("mine::a", doubled, {"bodies": [Scaled]}, r"Scaled takes \(scale\); the op has \(\)"),
    "frames of an op without states": ("mine::a", doubled, {"bodies": [ee.Lowering("frame", Doubled, is_frame=True)]},
        "for one frame, and the op has no states"),
    "a helper of another's name": ("mine::a", doubled, {"bodies": [CallsAnothersName]},
        "call mine::LastFrames, of which there is another"),
    "ours": ("edifice::selective_scan", doubled, {}, "edifice has ops of others; take a namespace of your own"),
    "ONNX's": ("onnx::a", doubled, {}, "onnx has ops of others"),
    "a runtime's": ("com.microsoft::a", doubled, {}, "com.microsoft has ops of others"),
    "torch's": ("aten::a", doubled, {}, "aten has ops of others"),
    "no namespace": ("doubled", doubled, {}, "a name is namespace::name, in lower case"),
    "capitals": ("mine::Doubled", doubled, {}, "a name is namespace::name, in lower case"),
    "a flag": ("mine::a", flagged, {}, "reverse is of type bool; what is no tensor can be float or int"),
    "by name alone": ("mine::a", by_name, {"bodies": [Scaled]}, "arguments go by position too"),
    "no annotations": ("mine::a", unannotated, {}, "x must have a type annotation"),
    "no shapes": ("mine::a", scanned, {"states": ["initial"], "streamed": ["x"]}, "declare shapes"),
    "no state": ("mine::a", scanned, {}, "with 0 states there are 1 outputs"),
    "no such input": ("mine::a", doubled, {"streamed": ["frames"]}, "frames: no such input; there are x"),
    "a name for a list": ("mine::a", doubled, {"streamed": "x"}, "streamed must be a list of names"),
    "no such fact": ("mine::a", doubled, {"state": "x"}, "state: no such thing is declared of an op"),
    "a read-out that is no sequence": ("mine::a", doubled, {"read_out": "x"}, "not among the streamed inputs"),
    "a first input of integers": ("mine::a", doubled, {"integers": ["x"]}, "first argument is a tensor of floating"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    name, definition, given, message = REFUSED[case]
    known = dict(LOWERINGS)
    with pytest.raises(ee.RequestError, match=message):
        ee.op(name, **{"bodies": [Doubled], **given})(definition)
    assert known == LOWERINGS


def test_a_call_that_no_body_computes_is_refused() -> None:
    """A frame of an op that has bodies for sequences alone, and a preference for what does not fit."""
    facts: dict[str, Any] = {"streamed": ["x", "c"], "states": ["initial"], "shapes": lambda x, *_: (x.shape, x.shape)}

    def integrated(
        x: Tensor, decay: Tensor, c: Tensor, gain: float, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return leaky_scan.definition(x, decay, c, gain, initial)

    scan = ee.op("mine::integrated", bodies=[LeakyLoop], **facts)(integrated)

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return scan(x, self.decay, x, 1.0)[0]

    frame = InputSpec("x", "float32", shape_of("batch", 4))
    model = trace(Frames(), [frame], [TensorSpec("y", "float32", frame.shape)], 20)
    with pytest.raises(ee.CheckError, match="mine::Integrated has no body for one frame with 3 inputs"):
        link(model)
    lowerings = [ee.Lowering(name, LeakyFrame, is_frame=True) for name in ("one", "two")]
    ee.op("mine::integrated", bodies=lowerings, prefer=lambda _: ("three", ""), **facts)(integrated)
    with pytest.raises(ee.CheckError, match="of mine::integrated 'three' is preferred; what fits is one, two"):
        link(model)


def test_domains_do_not_touch() -> None:
    """A stranger's op of the name of one of ours."""
    own = ee.op("mine::linear_scan", bodies=[Doubled])(doubled)
    assert LOWERINGS["mine::LinearScan"].declared is own
    assert LOWERINGS["edifice::LinearScan"].declared is ops.linear_scan
    assert EDIFICE.domain != MINE.domain


def test_the_page_of_ops_says_what_is_declared() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2] == generated(), "python tests/op_pages.py writes it anew"
