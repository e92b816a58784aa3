"""Modules as people have them: exported as they are, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from module_cases import FREE, Does, Steps, largest_error
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_reference import ops


class Holds(nn.Module):
    """Torch's own operators for control flow."""

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan
        from torch._higher_order_ops.while_loop import while_loop

        def combine(h: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
            after = 0.9 * h + frame
            return after, after.clone()

        _, y = scan(combine, x[:, 0] * 0, x, dim=1)
        _, total = while_loop(
            lambda turn, _: turn < x.shape[1],
            lambda turn, h: (turn + 1, h * 0.9 + x[:, 0]),
            (torch.tensor(0), y[:, -1]),
        )
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y + total[:, None],))


def test_torchs_own_operators_keep_their_length_free(tmp_path: Path) -> None:
    bundle = ee.export(Holds(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["sizes"] > 8


def test_inner_values_give_way_to_declared_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, linear: Tensor, add: Tensor) -> Tensor:
            return torch.relu(self.relu(self.linear(linear)) + add)

    args, free = (torch.randn(2, 4), torch.randn(2, 4)), ({0: "batch"}, {0: "batch"})
    for names in (None, ["relu/linear"], ["relu"], ["linear_1"]):
        bundle = ee.export(Two(), args, dynamic_shapes=free, output_names=names, output=tmp_path / "bot")
        onnx.checker.check_model(bundle.file("window/model.onnx"), full_check=True)


def test_a_running_sum_has_all_graphs(tmp_path: Path) -> None:
    bundle = ee.export(Steps(), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]


def test_a_state_may_be_given_by_name(tmp_path: Path) -> None:
    def step(*frame: Tensor, state: dict[str, Tensor]) -> Any:
        return frame[0] + state["sum"], {"sum": frame[0] + state["sum"]}

    bundle = ee.export(Steps(step=step), (torch.randn(2, 5, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["frames"] == 50


class Masked(nn.Module):
    """Causal attention with padding, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.triu(torch.full((length, length), float("-inf")), 1)
        padding = torch.where(attention_mask == 0, float("-inf"), 0.0)
        return self.attention(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0]


class Patches(nn.Module):
    """Patches of an image, in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        y, _ = ops.linear_scan(x, functional.logsigmoid(x))
        return y


class Block(nn.Module):
    """A Mamba block, as in the paper."""

    def __init__(self, width: int = 16, state: int = 4) -> None:
        super().__init__()
        self.state = state
        self.enter = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.select = nn.Linear(width, 1 + 2 * state)
        self.step_size = nn.Linear(1, width)
        self.log_rates = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))
        self.leave = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.enter(hidden_states).chunk(2, dim=-1)
        x = functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        size, b, c = self.select(x).split([1, self.state, self.state], dim=-1)
        delta = functional.softplus(self.step_size(size))
        y, _ = ops.selective_scan(delta * x, delta, -torch.exp(self.log_rates), b, c)
        return self.leave((y + self.skip * x) * functional.silu(z))


class Mamba(Block):
    """The same frame by frame: the ops take one frame, or several, from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.width = self.skip.numel()

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"conv": torch.zeros(batch, 3, self.width), "ssm": torch.zeros(batch, self.state, self.width)}

    def step(self, hidden_states: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, z = self.enter(hidden_states).chunk(2, dim=-1)
        x, conv = ops.causal_conv1d(x, self.conv.weight, self.conv.bias, self.width, state["conv"])
        x = functional.silu(x)
        size, b, c = self.select(x).split([1, self.state, self.state], dim=-1)
        delta = functional.softplus(self.step_size(size))
        y, ssm = ops.selective_scan(delta * x, delta, -torch.exp(self.log_rates), b, c, state["ssm"])
        return self.leave((y + self.skip * x) * functional.silu(z)), {"conv": conv, "ssm": ssm}

    extend = step


@pytest.mark.parametrize("target", ["portable", "web"])
def test_a_mamba_goes_frame_by_frame(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Mamba().eval()
    bundle = ee.export(module, (torch.randn(2, 20, 16),), dynamic_shapes=FREE, target=target, output=tmp_path / "bot")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]
    nodes = {
        graph: [node.op_type for node in onnx.load(bundle.file(entry.model)).graph.node]
        for graph, entry in bundle.manifest.graphs.items()
    }
    assert [node for node in nodes["stream"] if "_" in node] == ["CausalConv1d_frame_4to2", "SelectiveScan_frame_6to2"]
    assert {node.partition("_")[0] for node in nodes["prefill"]} > {"CausalConv1d", "SelectiveScan"}
    x = torch.randn(1, 50, 16)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double()).numpy()
    stream = ee.load(bundle).stream()
    assert largest_error(stream.prefill(x[:, :33].numpy()), expected[:, 32]) <= 1e-5
    for t in range(33, 50):
        assert largest_error(stream.step(x[:, t].numpy()), expected[:, t]) <= 1e-5


class Types(nn.Module):
    """An input of every type beside the usual."""

    def forward(self, x: Tensor, keep: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.where(keep, x.float(), 0.0) * times, ~keep, times.sum(-1)


class Counts(nn.Module):
    """Changes a buffer whenever it is called, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += 1
        return x * 2


IMAGE = {0: "batch", 2: "height", 3: "width"}


PEOPLES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Any]] = {
    "masked": (Masked, (torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.int64)), (FREE[0],) * 2),
    "patches": (Patches, (torch.randn(2, 3, 16, 12),), (IMAGE,)),
    "mamba": (Block, (torch.randn(2, 60, 16),), FREE),
    "compiled": (lambda: torch.compile(Block()), (torch.randn(2, 6, 16),), FREE),
    "parallel": (lambda: nn.DataParallel(Block()), (torch.randn(2, 6, 16),), FREE),
    "overflows on larger numbers": (lambda: Does(torch.exp), (torch.randn(2, 6, 4),), FREE),
    "every second": (lambda: Does(lambda x: x[:, ::2]), (torch.randn(2, 6, 4),), FREE),
    "one axis": (lambda: Does(lambda x: torch.cumsum(x, 0)), (torch.randn(6, 4),), ({0: "time"},)),
    "nothing free": (Block, (torch.randn(2, 6, 16),), None),
    "types": (
        Types,
        (torch.randn(2, 6).half(), torch.rand(2, 6) > 0.5, torch.randint(9, (2, 6), dtype=torch.int32)),
        (FREE[0],) * 3,
    ),
    "constant": (lambda: Does(lambda x: (x * 2, torch.ones(3))), (torch.randn(2, 6),), FREE),
    "input given back": (lambda: Does(lambda x: (x, x)), (torch.randn(2, 6),), FREE),
    "changes a buffer": (Counts, (torch.randn(2, 6),), FREE),
}


@pytest.mark.parametrize("name", list(PEOPLES))
def test_what_people_have_is_exported(name: str, tmp_path: Path) -> None:
    make, args, free = PEOPLES[name]
    torch.manual_seed(0)
    module = make()
    before = copy.deepcopy(module.state_dict()), [value.clone() for value in args]
    bundle = ee.export(module, args, dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.parity["sizes"] >= (8 if free else 1)
    assert ee.verify(bundle, ["cpu"], source=ee.Source(module, args, free)).passed
    assert all(torch.equal(value, before[0][key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, kept) for value, kept in zip(args, before[1], strict=True))


STABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "decays near 1": lambda x: functional.logsigmoid(x + 12),
    "decays near 0": lambda x: functional.logsigmoid(50 * x - 60),
    "differences of sums of decays": lambda x: functional.logsigmoid(x).cumsum(1),
    "logaddexp": lambda x: torch.logaddexp(20 * x, -5 * x),
    "expm1": lambda x: torch.expm1(1e-6 * x),
    "log1p": lambda x: torch.log1p(1e-6 * x.abs()),
    "log1p of more": lambda x: torch.log1p(3 * x.abs()),
}


@pytest.mark.parametrize("name", list(STABLE))
def test_what_operators_are_there_for_is_kept(name: str, tmp_path: Path) -> None:
    bundle = ee.export(Does(STABLE[name]), (torch.randn(2, 6, 4),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert bundle.manifest.parity["max_rel"] < 2e-6


def test_parametrizations_are_those_of_inference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), torch.randn(2, 5, 4)
    bundle = ee.export(module, (x,), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert module.training
    with torch.no_grad():
        expected = copy.deepcopy(module).double().eval()(x.double()).numpy()
    assert largest_error(ee.load(bundle)(x.numpy()), expected) < 1e-6


class Tied(nn.Module):
    """A weight under two names, weight norm, a buffer, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.dense = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dense(self.embedding(ids)) * self.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_right(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Tied().to(dtype)
    module.dense.register_forward_hook(lambda _module, _given, found: found * 2)
    before, mode = copy.deepcopy(module.state_dict()), module.training
    bundle = ee.export(module, (torch.randint(7, (2, 5)),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert module.training == mode
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {value.dtype for value in module.parameters()} == {dtype}
    ids = torch.randint(7, (3, 11))
    with torch.no_grad():
        # Of weight norm, what the values make in the module's own precision is what it computes with.
        table, dense, bias, scale = (
            value.double() for value in (module.embedding.weight, module.dense.weight, module.dense.bias, module.scale)
        )
        expected = ((table[ids] @ dense.T + bias) * 2 * scale @ table.T).numpy()
    assert largest_error(ee.load(bundle)(ids.numpy()), expected) < 1e-6


def test_ops_keep_their_lowerings_whatever_an_axis_is_called(tmp_path: Path) -> None:
    class Scans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = ops.linear_scan(x, -functional.softplus(self.dense(x)))
            return y[:, -1]

    def nodes(name: str) -> list[str]:
        torch.manual_seed(0)
        free = ({0: "batch", 1: name},)
        bundle = ee.export(Scans(), (torch.randn(2, 60, 64),), dynamic_shapes=free, output=tmp_path / name)
        return [node.op_type for node in onnx.load(bundle.file("window/model.onnx")).graph.node]

    assert nodes("sequence") == nodes("seq_len")


def test_a_module_without_parameters_of_four_sizes(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.relu(y)

    free = ({0: "a", 1: "b"}, {0: "c", 1: "d"})
    bundle = ee.export(Both(), (torch.randn(2, 3), torch.randn(5, 7)), dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.sizes == {"a": 2, "b": 3, "c": 5, "d": 7}
