"""Tracing: small graphs with readable names, and guards that no frozen length gets past."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import TINY
from lowered import nodes
from onnxscript import values
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.building.link import link
from edifice_export.bundle.manifest import GRAPHS, plain
from edifice_export.errors import CheckError
from edifice_export.graph.capture import check_same_graph, export_program
from edifice_export.graph.torch_private import parsed_once
from edifice_export.graph.trace import check_symbolic, trace, translate
from edifice_export.programs.graphs import entry, signature, state_specs
from edifice_export.specification import InputSpec, TensorSpec, shape_of
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture

README = (Path(__file__).parents[1] / "README.md").read_text()
INPUT = InputSpec("x", "float32", shape_of("batch", "sequence", 4))
OUTPUT = TensorSpec("y", "float32", shape_of("batch", 4))


@functools.cache
def traced(architecture: Architecture, numerics: str, layers: int, graph: str = "window") -> ir.Model:
    """An abstract graph of a tiny model, not to be changed."""
    config = architecture.config_class(**{**TINY, "num_layers": layers})
    model = architecture.model_class(config, numerics).eval()
    initialize(model, 0)
    states = () if graph == "window" else state_specs(model.initial_state(1))
    return trace(entry(model, graph), *signature(graph, config.embed_dim, config.output_size, states), 20, graph)


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda known: known.name)
LOW, HIGH = map(int, re.findall(r"(\d+) to (\d+) nodes a layer", README)[0])


@each_architecture
def test_a_layer_has_at_most_80_nodes(architecture: Architecture) -> None:
    one, two, three = (len(list(traced(architecture, "edifice", layers).graph)) for layers in (1, 2, 3))
    assert two - one == three - two <= 80
    assert one <= 80 + 20


def test_a_layer_has_as_many_nodes_as_the_readme_says() -> None:
    layers = [
        len(list(traced(known, "edifice", 2).graph)) - len(list(traced(known, "edifice", 1).graph))
        for known in ARCHITECTURES.values()
    ]
    assert (min(layers), max(layers)) == (LOW, HIGH)


@each_architecture
def test_a_layer_has_as_many_nodes_with_either_numerics(architecture: Architecture) -> None:
    def count(numerics: str) -> int:
        return sum((node.name or "").startswith("blocks.1") for node in traced(architecture, numerics, 2).graph)

    assert 0 < count("standard") == count("edifice")
    assert len(list(traced(architecture, "standard", 2).graph)) <= 2 * 80 + 20


@each_architecture
def test_names_say_where_nodes_come_from(architecture: Architecture) -> None:
    model = traced(architecture, "edifice", 2)
    names = Counter(node.name for node in model.graph)
    assert max(names.values()) == 1
    edifice = [node.name or "" for node in model.graph if node.domain == "edifice"]
    assert any(name.startswith("blocks.0.") for name in edifice)
    assert any(name.startswith("blocks.1.") for name in edifice)
    # Neither paths of the machine that traced it nor torch's own bookkeeping.
    text = onnx.printer.to_text(ir.to_proto(model))
    assert "pkg.torch" not in text
    assert str(Path(__file__).parents[1]) not in text


def test_a_bundles_models_pass_the_checker_and_load_where_nothing_of_ours_is_imported(bundle: ee.Bundle) -> None:
    code = (
        "import sys, onnx, onnxruntime as ort\n"
        "for path in sys.argv[1:]:\n"
        "    onnx.checker.check_model(path, full_check=True)\n"
        "    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)\n"
        "    session = ort.InferenceSession(path, providers=['CPUExecutionProvider'])\n"
        "    print([i.shape for i in session.get_inputs()], [o.shape for o in session.get_outputs()])\n"
        "assert not any(name.startswith(('torch', 'edifice')) for name in sys.modules)\n"
    )
    graphs = bundle.manifest.graphs
    paths = [str(bundle.file(graph.model)) for graph in graphs.values()]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    # Nor does a runtime find anything to warn of.
    assert done.stderr == ""
    options = bundle.manifest.program.options
    shapes = done.stdout.splitlines()
    assert shapes[0] == f"[['batch', 'sequence', {options['embed_dim']}]] [['batch', {options['hidden_size']}]]"
    declared = [[[plain(spec.shape) for spec in specs] for specs in (g.inputs, g.outputs)] for g in graphs.values()]
    assert shapes == [f"{inputs} {outputs}" for inputs, outputs in declared]


def test_a_bundles_models_have_symbols_and_functions(bundle: ee.Bundle) -> None:
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(bundle.file(graph.model))
        assert {function.domain for function in model.functions} == {"edifice"}
        called = nodes(node for function in model.functions for node in function.node)
        used = {node.op_type for node in (*model.graph.node, *called) if node.domain == "edifice"}
        assert used == {function.name for function in model.functions}
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "edifice": 1}
        assert model.ir_version == 10


def test_layer_norm_and_gelu_are_still_whole() -> None:
    """What ONNX Runtime has kernels for must not be taken apart."""
    operators = Counter(node.op_type for node in traced(ARCHITECTURES["hymba"], "standard", 2).graph)
    assert operators["LayerNormalization"] == 5
    assert operators["Gelu"] == 2


class LoopOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t] * self.weight
        return h


class ReadsLengthAsNumber(LoopOverTime):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) * self.weight / int(x.shape[1])


class ReshapesToTheTracedBatch(LoopOverTime):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1].reshape(int(x.shape[0]), 4) * self.weight


@pytest.mark.parametrize("module", [LoopOverTime, ReadsLengthAsNumber, ReshapesToTheTracedBatch])
def test_a_frozen_size_is_refused(module: type[nn.Module]) -> None:
    with pytest.raises(CheckError, match="batch, sequence"):
        trace(module(), [INPUT], [OUTPUT], 20)


class RemembersTheTracedLength(LoopOverTime):
    """Smuggles the length past torch: a constant that depends on it, though no dimension does."""

    def forward(self, x: Tensor) -> Tensor:
        size = torch.fx.experimental.symbolic_shapes.guarding_hint_or_throw(x.shape[1])
        return x[:, -1] * self.weight * float(size)


class Doubles(LoopOverTime):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1] * self.weight * 2


class LastFrame(LoopOverTime):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1] * self.weight


class HoldsATableOfTheTracedLength(LoopOverTime):
    """Smuggles it into the values of a constant whose shape it leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        size = torch.fx.experimental.symbolic_shapes.guarding_hint_or_throw(x.shape[1])
        return x[:, -1] * self.weight * torch.tensor([1.0, 2.0, 3.0, float(size)])


class FiltersAsFarAsTheTracedLength(LoopOverTime):
    """Right at every length up to the traced one."""

    def forward(self, x: Tensor) -> Tensor:
        size = torch.fx.experimental.symbolic_shapes.guarding_hint_or_throw(x.shape[1])
        padded = torch.nn.functional.pad(x.transpose(1, 2), (size - 1, 0))
        taps = torch.ones(4, 1, size)
        return torch.nn.functional.conv1d(padded, taps, groups=4)[:, :, -1] * self.weight


class AddsALittleForEachTracedFrame(LoopOverTime):
    def forward(self, x: Tensor) -> Tensor:
        size = torch.fx.experimental.symbolic_shapes.guarding_hint_or_throw(x.shape[1])
        return x[:, -1] * self.weight * (1 + 1e-5 * size)


@pytest.mark.parametrize(
    "module",
    [
        *(RemembersTheTracedLength, HoldsATableOfTheTracedLength),
        *(FiltersAsFarAsTheTracedLength, AddsALittleForEachTracedFrame),
    ],
)
def test_a_constant_made_of_the_traced_length_is_refused(module: type[nn.Module]) -> None:
    with pytest.raises(CheckError, match="depends on the traced size"):
        trace(module(), [INPUT], [OUTPUT], 20)


def test_the_guards_see_what_differs() -> None:
    good = trace(Doubles(), [INPUT], [OUTPUT], 20)
    check_symbolic(good, [INPUT], [OUTPUT])
    with pytest.raises(CheckError, match=r"y was declared \[batch, 5\] and exported as \[batch, 4\]"):
        check_symbolic(good, [INPUT], [TensorSpec("y", "float32", shape_of("batch", 5))])
    with pytest.raises(CheckError, match="1 inputs or outputs where 0 were declared"):
        check_symbolic(good, [INPUT], [])
    good.graph.inputs[0].shape = ir.Shape([2, ir.SymbolicDim("sequence"), 4])
    with pytest.raises(CheckError, match="should stay free was frozen"):
        check_symbolic(good, [INPUT], [OUTPUT])
    one, same, other = (export_program(module(), [INPUT]) for module in (Doubles, Doubles, LastFrame))
    check_same_graph(one, same)
    for pair in ((one, other), (other, one)):
        with pytest.raises(CheckError, match="depends on the traced size"):
            check_same_graph(*pair)


def test_a_good_module_runs_at_every_length() -> None:
    model = link(trace(Doubles(), [INPUT], [OUTPUT], 20))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 5), (2, 100)):
        x = torch.randn(batch, length, 4)
        assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), x[:, -1] * 2)


class Applies(LoopOverTime):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


AS_IT_IS = [
    lambda x: torch.bmm(x.transpose(1, 2), x.sigmoid()).sum(2),
    lambda x: torch.nn.functional.dropout(x, 0.5, training=False).chunk(2, -1)[0].sum(1).repeat(1, 2),
    lambda x: torch.nn.functional.layer_norm(x, (4,))[:, -1],
]
DECOMPOSED = [
    lambda x: torch.einsum("btc,bt->bc", x, x.softmax(1)[..., 0]),
    lambda x: x.movedim(1, 0)[-1].unflatten(1, (2, 2)).swapaxes(1, 2).flatten(1),
    lambda x: torch.nn.functional.scaled_dot_product_attention(*3 * [x[:, None]])[:, 0, -1],
    lambda x: x.to(torch.float64).sum(1).float(),
    lambda x: x.std(1),
    lambda x: x.sum(1).mul_(2).add_(1),
    lambda x: torch.cond(x.sum() > 0, lambda x: x.sum(1), lambda x: x.mean(1).exp(), (x,)),
]


@pytest.mark.parametrize(
    ("function", "decomposed"), [*((f, False) for f in AS_IT_IS), *((f, True) for f in DECOMPOSED)]
)
def test_torch_decomposes_what_its_exporter_does_not_take(
    function: Callable[[Tensor], Tensor], decomposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, decompose = Counter[str](), torch.export.ExportedProgram.run_decompositions

    def counted(*args: Any) -> torch.export.ExportedProgram:
        count["decompositions"] += 1
        return decompose(*args)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    module = Applies(function)
    model = link(trace(module, [INPUT], [OUTPUT], 20))
    assert count["decompositions"] == decomposed
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 2), (3, 5), (2, 100)):
        x = torch.randn(batch, length, 4)
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found, module(x).detach())


@pytest.mark.parametrize("graph", GRAPHS)
@each_architecture
def test_no_model_of_ours_is_decomposed(
    architecture: Architecture, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    traced.__wrapped__(architecture, "standard", 1, graph)


def test_without_a_table_torch_decomposes_by_its_own() -> None:
    program = export_program(Applies(AS_IT_IS[2]), [INPUT])
    translate(program, [INPUT], 20)
    assert "aten.layer_norm.default" in str(program.graph)
    assert "aten.layer_norm.default" not in str(program.run_decompositions().graph)


def test_transposes_that_cancel_are_taken_out() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(1, 2).transpose(2, 1) * self.scale
            return y.permute(2, 0, 1).permute(1, 2, 0)

    same = TensorSpec("y", "float32", shape_of("batch", "sequence", 4))
    assert [node.op_type for node in trace(Turning(), [INPUT], [same], 20).graph] == ["Mul"]


def _double(x):  # type: ignore[no-untyped-def]
    return x + x


def test_torchs_translations_are_parsed_once() -> None:
    translation = values.TracedOnnxFunction(values.Opset("test", 1), _double)
    before = values.TracedOnnxFunction.function_ir
    with parsed_once():
        assert translation.function_ir is translation.function_ir
        assert str(translation.function_ir) == str(before.fget(translation))
    # As in two threads: the one that began first ends first.
    with contextlib.ExitStack() as second, parsed_once():
        second.enter_context(parsed_once())
    assert values.TracedOnnxFunction.function_ir is before
    assert translation.function_ir is not translation.function_ir
