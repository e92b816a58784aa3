"""Ops that other people's models are made of: against formulas, at lengths of thousands, and inside of modules."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lowered import frame_graph, lower, sequence_graph
from module_cases import FREE, largest_error
from op_cases import CASES, SIZES, Arguments, arguments
from test_lowerings import assert_agree, exact_at_length, long
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_reference import ops


def as_numpy(given: Arguments) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in given.items() if isinstance(value, Tensor)}


def test_linear_attention_is_masked_attention_without_a_softmax() -> None:
    """By the weights between all frames, with a decay for each channel of a key."""
    given = arguments("linear_attention_keys")
    y, state = ops.linear_attention(**given)
    q, k, v, g, s0 = as_numpy(given).values()
    since = np.cumsum(g, axis=1)
    wanted = np.einsum("bthk,bhkv->bthv", q * np.exp(since), s0)
    for t in range(SIZES["sequence"]):
        for s in range(t + 1):
            weight = np.einsum("bhk,bhk->bh", q[:, t], k[:, s] * np.exp(since[:, t] - since[:, s]))
            wanted[:, t] += weight[..., None] * v[:, s]
    np.testing.assert_allclose(y, wanted, atol=1e-12)
    aged = k * np.exp(since[:, -1:] - since)
    left = np.exp(since[:, -1])[..., None] * s0 + np.einsum("bthk,bthv->bhkv", aged, v)
    np.testing.assert_allclose(state, left, atol=1e-12)


def test_linear_attention_is_mamba_2s_recurrence() -> None:
    """Heads that share b and c are a selective scan whose channels have rates of their own, the same in every state."""
    x, delta, a, b, c, initial = arguments("selective_scan").values()
    a = a[:, :1].contiguous()
    wanted, left = ops.selective_scan(x, delta, a.expand(-1, SIZES["state"]).contiguous(), b, c, initial)
    log_decay = (delta * a[:, 0])[..., None]
    heads = initial.transpose(1, 2)[..., None].contiguous()
    y, state = ops.linear_attention(c[:, :, None], b[:, :, None], x[..., None], log_decay, heads)
    torch.testing.assert_close(y[..., 0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[..., 0], left.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lowering", ["chunked", "scan"])
def test_queries_and_keys_that_heads_share(lowering: str) -> None:
    case = CASES["linear_attention_shared"]
    graph = lower(case, case.arguments(SIZES), lowering=lowering)
    for batch, length in ((1, 1), (3, 64), (2, 130)):
        values = case.entering_arguments(SIZES | {"batch": batch, "sequence": length}, length)
        assert_agree(graph(values), case.define(values))


def test_the_gated_delta_rule_is_a_product_of_matrices() -> None:
    """S = (I - beta k k') exp(g) S + beta k v', in one head at a time."""
    given = arguments("gated_delta_rule_keys")
    y, state = ops.gated_delta_rule(**given)
    q, k, v, g, beta, initial = as_numpy(given).values()
    for entry in range(SIZES["batch"]):
        for head in range(SIZES["heads"]):
            s, at = initial[entry, head], (entry, slice(None), head)
            for t, (q_t, k_t, v_t, g_t, b_t) in enumerate(zip(q[at], k[at], v[at], g[at], beta[at], strict=True)):
                s = (np.eye(len(k_t)) - b_t * np.outer(k_t, k_t)) @ np.diag(np.exp(g_t)) @ s + b_t * np.outer(k_t, v_t)
                np.testing.assert_allclose(y[entry, t, head], q_t @ s, atol=1e-12)
            np.testing.assert_allclose(state[entry, head], s, atol=1e-12)


def test_the_generalised_delta_rule_has_the_gated_one_within_it() -> None:
    given = arguments("gated_delta_rule_keys")
    q, k, v, g, beta, initial = given.values()
    scaled = beta[..., None] * k
    found = ops.generalized_delta_rule(q, scaled, v, g, torch.exp(g) * k, -scaled, initial)
    torch.testing.assert_close(found, ops.gated_delta_rule(**given), rtol=0, atol=1e-12)


def test_the_generalised_delta_rule_is_a_product_of_matrices() -> None:
    """S = (diag(exp(g)) + b a') S + k v', in one head at a time."""
    given = arguments("generalized_delta_rule")
    y, state = ops.generalized_delta_rule(**given)
    *streamed, initial = as_numpy(given).values()
    for entry in range(SIZES["batch"]):
        for head in range(SIZES["heads"]):
            s = initial[entry, head]
            for t, (q, k, v, g, a, b) in enumerate(zip(*(each[entry, :, head] for each in streamed), strict=True)):
                s = (np.diag(np.exp(g)) + np.outer(b, a)) @ s + np.outer(k, v)
                np.testing.assert_allclose(y[entry, t, head], q @ s, atol=1e-12)
            np.testing.assert_allclose(state[entry, head], s, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_the_delta_rule_is_exact_where_all_keys_are_alike(beta: float) -> None:
    """Nothing decays: powers of the matrix between frames would be as large as 1e17."""
    given = arguments("gated_delta_rule", sequence=300)
    given |= {"key": given["key"][:, :1].expand_as(given["key"]).contiguous()}
    given |= {"log_decay": torch.zeros_like(given["log_decay"]), "beta": torch.full_like(given["beta"], beta)}
    given = {key: value.float().double() for key, value in given.items()}
    y, state = sequence_graph("gated_delta_rule", "chunked")(given)
    for found, wanted in zip((y, state), ops.gated_delta_rule(**given), strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_wkv_is_an_average_weighed_by_exponentials() -> None:
    """By the weights themselves, from nothing; and for keys whose exponentials are beyond all numbers."""
    key, value, log_decay, bonus, *_ = arguments("wkv").values()
    y, above, below, largest = ops.wkv(key, value, log_decay, bonus)
    k, v, w, u = (each.numpy() for each in (key, value, log_decay, bonus))
    for t in range(SIZES["sequence"] + 1):
        weights = np.exp(w * np.arange(t - 1, -1, -1)[:, None] + k[:, :t])
        a, b = (weights * v[:, :t]).sum(1), weights.sum(1)
        if t < SIZES["sequence"]:
            own = np.exp(u + k[:, t])
            np.testing.assert_allclose(y[:, t], (a + own * v[:, t]) / (b + own), atol=1e-12)
    np.testing.assert_allclose(above * torch.exp(largest), a, rtol=1e-12)
    np.testing.assert_allclose(below * torch.exp(largest), b, rtol=1e-12)
    for shift in (-900.0, 900.0):
        torch.testing.assert_close(ops.wkv(key + shift, value, log_decay, bonus)[0], y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [-900.0, 0.0, 900.0])
def test_wkv_takes_keys_of_any_size_after_nothing(shift: float) -> None:
    case = CASES["wkv"]
    values = case.entering_arguments(SIZES | {"sequence": 40}, 1)
    values |= {memory: torch.zeros_like(values[memory]) for memory in case.memory}
    values |= {"key": (values["key"] + shift).float().double()}
    y, *_ = case.define(values)
    for found in (sequence_graph("wkv")(values), case.by_frames(frame_graph("wkv"), values)):
        # Float32 has numbers of 900 to within 6e-5.
        torch.testing.assert_close(found[0], y, rtol=0, atol=1e-5 if shift == 0 else 3e-4)


def test_mambas_selective_scan_is_ours_with_plain_torch_around_it() -> None:
    """Skip, gate, bias and softplus of the step, and groups of b and c, as mamba_ssm's selective_scan_fn has them."""
    x, _, a, _, _, initial = arguments("selective_scan", channels=4).values()
    draw = torch.Generator().manual_seed(1)
    z, delta = (torch.randn(x.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    b, c = (torch.randn(2, 9, 2, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    skip, bias = (torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(2))

    step = functional.softplus(delta + bias)
    parts = [
        ops.selective_scan((step * x)[..., at], step[..., at], a[at], b[:, :, group], c[:, :, group], initial[..., at])
        for group, at in enumerate((slice(0, 2), slice(2, 4)))
    ]
    y = (torch.cat([part for part, _ in parts], dim=-1) + skip * x) * functional.silu(z)
    state = torch.cat([part for _, part in parts], dim=-1)

    h = initial.numpy().transpose(0, 2, 1)
    for t in range(SIZES["sequence"]):
        d = np.log1p(np.exp((delta[:, t] + bias).numpy()))[..., None]
        b_t, c_t = (each[:, t].numpy().repeat(2, axis=1) for each in (b, c))
        h = np.exp(d * a.numpy()) * h + d * b_t * x[:, t].numpy()[..., None]
        gate = z[:, t].numpy() / (1 + np.exp(-z[:, t].numpy()))
        np.testing.assert_allclose(y[:, t], ((h * c_t).sum(-1) + (skip * x[:, t]).numpy()) * gate, atol=1e-12)
    np.testing.assert_allclose(state, h.transpose(0, 2, 1), atol=1e-12)


def decays_of(name: str, rate: float) -> Tensor:
    """The same in every frame."""
    return torch.full_like(arguments(name, batch=1, sequence=4096)["log_decay"], -rate)


MATRIX_STATES = [
    "linear_attention",
    "linear_attention_keys",
    "gated_delta_rule",
    "gated_delta_rule_keys",
    "generalized_delta_rule",
]


@pytest.mark.parametrize("rate", [1e-5, 20.0])
@pytest.mark.parametrize("name", MATRIX_STATES)
def test_matrix_states_are_exact_at_length_4096(name: str, rate: float) -> None:
    exact_at_length(name, long(name, log_decay=decays_of(name, rate)))


@pytest.mark.parametrize("rate", [0.0, 30.0, float("inf")])
@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("linear_attention", "chunked"),
        ("linear_attention", "scan"),
        ("linear_attention_keys", "chunked_by_key"),
        ("gated_delta_rule", "chunked"),
        ("gated_delta_rule", "scan"),
    ],
)
def test_nothing_is_left_of_a_past_that_has_decayed_and_all_of_one_that_has_not(
    name: str, lowering: str, rate: float
) -> None:
    """Decays of exactly 0 and 1 among them; a frame is right for itself, however much larger those before it were."""
    given = arguments(name, sequence=200)
    loud = torch.exp(3 * torch.randn(2, 200, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    given |= {"value": given["value"] * loud, "log_decay": torch.full_like(given["log_decay"], -rate)}
    given = {key: value.float().double() for key, value in given.items()}
    y, _ = sequence_graph(name, lowering)(given)
    wanted, _ = CASES[name].define(given)
    size = wanted.abs().amax(dim=(-1, -2), keepdim=True) if rate else wanted.abs().max()
    assert float(((y - wanted).abs() / size).max()) <= 1e-5


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("linear_attention", "chunked"),
        ("linear_attention_keys", "chunked_by_key"),
        ("gated_delta_rule", "chunked"),
    ],
)
def test_chunks_may_be_full_or_not(name: str, lowering: str, length: int) -> None:
    case = CASES[name]
    values = case.entering_arguments(SIZES | {"sequence": length}, length)
    assert_agree(sequence_graph(name, lowering)(values), case.define(values))


HEADS, WIDTH = 2, 3


class Gated(nn.Module):
    """Linear attention as layers have it, with a decay for each head."""

    outputs = 3 * HEADS * WIDTH + HEADS

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"matrix": torch.zeros(batch, HEADS, WIDTH, WIDTH)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        frames, gate = x[..., :-HEADS], x[..., -HEADS:]
        query, key, value = frames.unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
        y, after = ops.linear_attention(query, key, value, functional.logsigmoid(gate)[..., None], state["matrix"])
        return y.flatten(-2), {"matrix": after}


class Learns(nn.Module):
    """The gated delta rule, with a decay for each head."""

    outputs = 3 * HEADS * WIDTH + 2 * HEADS
    initial_state = Gated.initial_state

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        frames, gate, beta = x.split([3 * HEADS * WIDTH, HEADS, HEADS], dim=-1)
        query, key, value = frames.unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
        decay = functional.logsigmoid(gate)[..., None]
        key = functional.normalize(key, dim=-1)
        y, after = ops.gated_delta_rule(query, key, value, decay, torch.sigmoid(beta), state["matrix"])
        return y.flatten(-2), {"matrix": after}


class Averages(nn.Module):
    """RWKV-4's average, gated."""

    outputs = 9

    def __init__(self) -> None:
        super().__init__()
        self.rates, self.bonus = (nn.Parameter(torch.linspace(low, 0.5, 3)) for low in (-3.0, -0.5))

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {name: torch.zeros(batch, 3) for name in ("numerator", "denominator", "maximum")}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        gate, key, value = x.chunk(3, dim=-1)
        y, *after = ops.wkv(key, value, -torch.exp(self.rates), self.bonus, *state.values())
        return torch.sigmoid(gate) * y, dict(zip(state, after, strict=True))


class Rewrites(nn.Module):
    """RWKV-7's recurrence."""

    outputs = 6 * HEADS * WIDTH
    initial_state = Gated.initial_state

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        query, key, value, gate, kk, rate = x.unflatten(-1, (6, HEADS, WIDTH)).unbind(-3)
        kk = functional.normalize(kk, dim=-1)
        decay = -0.606531 * torch.sigmoid(gate)
        y, after = ops.generalized_delta_rule(query, key, value, decay, -kk, kk * torch.sigmoid(rate), state["matrix"])
        return y.flatten(-2), {"matrix": after}


class Layer(nn.Module):
    """A layer around a recurrence, as sequences and frame by frame."""

    def __init__(self, recurrence: nn.Module) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.enter = nn.Linear(5, recurrence.outputs)
        self.initial_state = recurrence.initial_state

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.recurrence(self.enter(x), state)

    extend = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.initial_state(1))[0]


@pytest.mark.parametrize("recurrence", [Gated, Learns, Averages, Rewrites], ids=lambda made: made.__name__)
def test_a_layer_of_it_has_all_graphs(recurrence: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Layer(recurrence()).eval()
    bundle = ee.export(module, (torch.randn(2, 9, 5),), dynamic_shapes=FREE, output=tmp_path / "bot")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]
    stream_graph = onnx.load(bundle.file("stream/model.onnx")).graph
    assert any("_frame_" in node.op_type for node in stream_graph.node)
    x = torch.randn(1, 90, 5)
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(x.double()).numpy()
    model = ee.load(bundle)
    assert largest_error(model(x.numpy()), wanted) <= 1e-5
    stream = model.stream()
    assert largest_error(stream.prefill(x[:, :70].numpy()), wanted[:, 69]) <= 1e-5
    for t in range(70, 90):
        assert largest_error(stream.step(x[:, t].numpy()), wanted[:, t]) <= 1e-5
