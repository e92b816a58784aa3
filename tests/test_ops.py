"""The edifice ops: their torch definitions, and the ONNX functions that must compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edifice_export.defaults import OPSETS
from edifice_export.functions import LOWERINGS
from edifice_export.link import link
from edifice_export.runtime.providers import ORT_ERRORS
from edifice_export.specification import TensorSpec
from edifice_export.trace import trace
from edifice_reference import ops

Sizes = dict[str, int]
Draw = Callable[..., Tensor]


def selective_scan(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    rates = -torch.exp(draw(n["channels"], n["state"]))
    shape = (n["batch"], n["sequence"])
    step = torch.nn.functional.softplus(draw(*shape, n["channels"]))
    return draw(*shape, n["channels"]), step, rates, draw(*shape, n["state"]), draw(*shape, n["state"])


def linear_scan(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    shape = (n["batch"], n["sequence"])
    return draw(*shape, n["channels"]), -torch.exp(draw(*shape, 1))


def diagonal_scan(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    x = draw(n["batch"], n["sequence"], n["channels"])
    shape = (n["batch"], n["sequence"], n["state"])
    return x, -torch.exp(draw(n["state"])), draw(*shape), draw(*shape)


def cumulative_scan(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    return *diagonal_scan(draw, n), 1e-10


def fft_conv(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    return draw(n["batch"], n["sequence"], n["channels"]), draw(max(n["sequence"], 70), n["channels"])


def causal_conv1d(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    x = draw(n["batch"], n["sequence"], n["channels"])
    return x, draw(n["channels"], 1, n["kernel"]), draw(n["channels"]), n["channels"]


def causal_attention(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    width = n["heads"] * n["channels"]
    seen = n["prefix"] + n["sequence"]
    key, value = draw(n["batch"], seen, width), draw(n["batch"], seen, width)
    return draw(n["batch"], n["sequence"], width), key, value, n["heads"], 1e-8


def floored_layer_norm(draw: Draw, n: Sizes) -> tuple[Any, ...]:
    # Every other frame has a variance far below the floor.
    x = draw(n["batch"], n["sequence"], 2 + n["channels"])
    x[:, ::2] *= 1e-5
    return x, draw(2 + n["channels"]), draw(2 + n["channels"]), 1e-5


ARGUMENTS: dict[str, Callable[[Draw, Sizes], tuple[Any, ...]]] = {
    function.__name__: function
    for function in (
        causal_attention,
        causal_conv1d,
        cumulative_scan,
        diagonal_scan,
        fft_conv,
        floored_layer_norm,
        linear_scan,
        selective_scan,
    )
}
"""Arguments of each op for given sizes. An op without an entry fails the tests."""

SIZES: Sizes = {"batch": 2, "sequence": 9, "channels": 3, "state": 4, "kernel": 4, "heads": 2, "prefix": 3}

each_op = pytest.mark.parametrize("name", ops.OPS)


def arguments(name: str, sizes: Sizes, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    return ARGUMENTS[name](lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64), sizes)


@each_op
def test_gradients_are_those_of_the_definition(name: str) -> None:
    given = arguments(name, SIZES | {"sequence": 4})
    given = tuple(value.requires_grad_() if isinstance(value, Tensor) else value for value in given)
    assert torch.autograd.gradcheck(getattr(ops, name), given)


@each_op
def test_torch_accepts_the_op(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.edifice, name).default, arguments(name, SIZES))


def test_selective_scan_is_the_recurrence() -> None:
    x, delta, a, b, c = arguments("selective_scan", SIZES)
    for channel in range(SIZES["channels"]):
        h = np.zeros(SIZES["state"])
        for t in range(SIZES["sequence"]):
            for n in range(SIZES["state"]):
                h[n] = math.exp(delta[0, t, channel] * a[channel, n]) * h[n] + b[0, t, n] * x[0, t, channel]
            expected = sum(float(c[0, t, n]) * h[n] for n in range(SIZES["state"]))
            assert ops.selective_scan(x, delta, a, b, c)[0, t, channel].item() == pytest.approx(expected, abs=1e-12)


def test_linear_scan_is_the_recurrence() -> None:
    x, _ = arguments("linear_scan", SIZES)
    log_decay = -torch.rand(x.shape, dtype=torch.float64)
    found = ops.linear_scan(x, log_decay)
    h = np.zeros(x[:, 0].shape)
    for t in range(SIZES["sequence"]):
        h = np.exp(log_decay[:, t].numpy()) * h + x[:, t].numpy()
        np.testing.assert_allclose(found[:, t], h, atol=1e-12)
    shared = ops.linear_scan(x, log_decay[..., :1])
    torch.testing.assert_close(shared, ops.linear_scan(x, log_decay[..., :1].expand_as(x).contiguous()))


def test_diagonal_scan_is_a_selective_scan_of_constant_decay() -> None:
    x, log_decay, b, c = arguments("diagonal_scan", SIZES)
    expected = ops.selective_scan(x, torch.ones_like(x), log_decay[None], b, c)
    torch.testing.assert_close(ops.diagonal_scan(x, log_decay, b, c), expected, rtol=1e-12, atol=1e-12)


def test_cumulative_scan_is_a_quotient_of_cumulative_products() -> None:
    x, log_decay, b, c, epsilon = arguments("cumulative_scan", SIZES | {"sequence": 600})
    product = torch.exp(torch.cumsum(log_decay.expand(600, -1), 0))[None, :, None]
    h = product * torch.cumsum(b[:, :, None] * x[..., None] / (product + epsilon), 1)
    expected = (c[:, :, None] * h).sum(-1)
    torch.testing.assert_close(ops.cumulative_scan(x, log_decay, b, c, epsilon), expected, rtol=1e-9, atol=1e-9)


def test_cumulative_scan_is_exact_until_something_has_decayed() -> None:
    x, log_decay, b, c, epsilon = arguments("cumulative_scan", SIZES | {"sequence": 60})
    exact = ops.diagonal_scan(x, log_decay / 30, b, c)
    error = (ops.cumulative_scan(x, log_decay / 30, b, c, epsilon) - exact).abs().amax(dim=(0, 2))
    assert error[:5].max() < 1e-8
    far = (ops.cumulative_scan(x, log_decay, b, c, epsilon) - ops.diagonal_scan(x, log_decay, b, c)).abs()
    assert far[:, 40:].max() > 0.1


@pytest.mark.parametrize(("length", "window"), [(1, 1), (1, 5), (5, 5), (6, 9)])
def test_fft_conv_is_the_sum_over_the_past(length: int, window: int) -> None:
    x, kernel = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(window, 3, dtype=torch.float64)
    found = ops.fft_conv(x, kernel)
    for t in range(length):
        expected = sum(kernel[t - s] * x[:, s] for s in range(t + 1))
        torch.testing.assert_close(found[:, t], expected, rtol=1e-12, atol=1e-12)


def test_fft_conv_refuses_more_frames_than_its_kernel_has_taps() -> None:
    with pytest.raises(ValueError, match="71 frames is longer than the kernel, which ends at 70"):
        ops.fft_conv(torch.zeros(1, 71, 3), torch.zeros(70, 3))


def test_causal_conv1d_is_the_sum() -> None:
    x, weight, bias, groups = arguments("causal_conv1d", SIZES)
    y = ops.causal_conv1d(x, weight, bias, groups)
    for t in range(SIZES["sequence"]):
        taps = [weight[1, 0, k] * x[0, t - 3 + k, 1] for k in range(4) if t - 3 + k >= 0]
        assert y[0, t, 1].item() == pytest.approx(float(sum(taps) + bias[1]), abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_causal_attention_is_torchs(epsilon: float) -> None:
    query, key, value, heads, _ = arguments("causal_attention", SIZES)
    length, seen = SIZES["sequence"], SIZES["sequence"] + SIZES["prefix"]
    mask = torch.ones(length, seen).tril(SIZES["prefix"]).bool()
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    found = ops.causal_attention(query, key, value, heads, epsilon)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 if epsilon else 1e-12)
    assert torch.equal(found, expected) is False or epsilon == 0


def test_causal_attention_refuses_an_epsilon_that_float32_would_see() -> None:
    query, key, value, heads, _ = arguments("causal_attention", SIZES)
    with pytest.raises(ValueError, match="epsilon"):
        ops.causal_attention(query, key, value, heads, 1e-6)


def test_floored_layer_norm_is_torchs_above_the_floor_and_a_scaling_below() -> None:
    x, weight, bias, epsilon = arguments("floored_layer_norm", SIZES)
    found = ops.floored_layer_norm(x, weight, bias, epsilon)
    expected = nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    torch.testing.assert_close(found[:, 1::2], expected[:, 1::2])
    small = x[:, ::2]
    scaled = (small - small.mean(-1, keepdim=True)) / epsilon**0.5 * weight + bias
    torch.testing.assert_close(found[:, ::2], scaled)


class Calls(nn.Module):
    """A module that is one call of an op: tensors that hold time are inputs, the others parameters."""

    def __init__(self, name: str, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.op = getattr(ops, name)
        self.given = given
        self.streamed = [index for index, value in enumerate(given) if isinstance(value, Tensor) and value.ndim == 3]
        if name == "causal_conv1d":
            self.streamed = [0]
        for index, value in enumerate(given):
            if isinstance(value, Tensor) and index not in self.streamed:
                self.register_parameter(f"p{index}", nn.Parameter(value))
        self.anchor = nn.Parameter(torch.zeros(1, dtype=given[0].dtype))

    def forward(
        self, x0: Tensor, x1: Tensor | None = None, x2: Tensor | None = None, x3: Tensor | None = None
    ) -> Tensor:
        feed = iter((x0, x1, x2, x3))
        values = [
            next(feed) if index in self.streamed else getattr(self, f"p{index}", value)
            for index, value in enumerate(self.given)
        ]
        return self.op(*values)


def lower(name: str, sizes: Sizes, opset: int = 20, given: tuple[Any, ...] = ()) -> tuple[ir.Model, onnx.ModelProto]:
    """The op alone, traced in float32 and linked; with these arguments in place of drawn ones, if there are."""
    given = tuple(value.float() if isinstance(value, Tensor) else value for value in given or arguments(name, sizes))
    module = Calls(name, given)
    streamed = [given[index] for index in module.streamed]
    # Keys that reach further back than queries have a length of their own.
    inputs = [
        TensorSpec(f"x{index}", "float32", ("batch", f"length{value.shape[1]}", value.shape[2]))
        for index, value in enumerate(streamed)
    ]
    symbols = list(dict.fromkeys(spec.shape[1] for spec in inputs))
    outputs = [TensorSpec("y", "float32", ("batch", symbols[0], given[0].shape[2]))]
    model = trace(module, inputs, outputs, opset)
    return model, link(model)


def run(model: onnx.ModelProto, feeds: list[Tensor]) -> np.ndarray:
    options = ort.SessionOptions()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {f"x{index}": value.float().numpy() for index, value in enumerate(feeds)})
    return output


@each_op
def test_every_op_has_a_function_and_no_function_is_idle(name: str) -> None:
    assert set(LOWERINGS) == {"".join(part.capitalize() for part in op.split("_")) for op in ops.OPS}
    model, linked = lower(name, SIZES | {"prefix": 0})
    (node,) = list(model.graph)
    assert (node.domain, node.op_type) == ("edifice", "".join(part.capitalize() for part in name.split("_")))
    onnx.checker.check_model(linked, full_check=True)


@each_op
@pytest.mark.parametrize("opset", [OPSETS[0], 20, 23, OPSETS[-1]])
def test_functions_are_valid_in_every_opset(name: str, opset: int) -> None:
    _, linked = lower(name, SIZES | {"prefix": 0}, opset)
    onnx.checker.check_model(linked, full_check=True)
    given = arguments(name, SIZES | {"prefix": 0})
    expected = getattr(ops, name)(*given)
    streamed = [given[index] for index in Calls(name, given).streamed]
    assert {(entry.domain, entry.version) for entry in linked.functions[0].opset_import} == {("", opset)}
    np.testing.assert_allclose(run(linked, streamed), expected.numpy(), atol=1e-5, rtol=1e-5)


@each_op
def test_one_graph_serves_every_size(name: str) -> None:
    """Any batch and length after one trace: 40 sizes, drawn by hypothesis."""
    sizes = SIZES | {"prefix": 0}
    _, linked = lower(name, sizes)
    session_model = linked

    @settings(max_examples=40, deadline=None)
    @given(batch=st.integers(1, 5), length=st.integers(1, 70), seed=st.integers(0, 1000))
    def agrees(batch: int, length: int, seed: int) -> None:
        traced = arguments(name, sizes)
        drawn = arguments(name, sizes | {"batch": batch, "sequence": length}, seed)
        streamed = Calls(name, traced).streamed
        values = [drawn[index] if index in streamed else value for index, value in enumerate(traced)]
        expected = getattr(ops, name)(*values).numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        found = run(session_model, [values[index] for index in streamed])
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=1e-5)

    agrees()


@pytest.mark.parametrize("prefix", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attention_sees_its_prefix(prefix: int, length: int) -> None:
    _, linked = lower("causal_attention", SIZES)
    given = arguments("causal_attention", SIZES | {"prefix": prefix, "sequence": length}, 5)
    np.testing.assert_allclose(run(linked, list(given[:3])), ops.causal_attention(*given).numpy(), atol=1e-5)


LONG = 4096


def exact_at_length(name: str, given: tuple[Any, ...]) -> None:
    """Asserts 1e-5 of the largest value, against float64 and the same float32 arguments, at a length of LONG."""
    _, linked = lower(name, SIZES, given=given)
    values = tuple(value.float().double() if isinstance(value, Tensor) else value for value in given)
    expected = getattr(ops, name)(*values).numpy()
    found = run(linked, [values[index] for index in Calls(name, values).streamed])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# Decays of a frame from exp(-1e-5), of which all of the sequence is left, to exp(-20), of which nothing is.
each_rate = pytest.mark.parametrize("rate", [1e-5, 1.12e-4, 1.37e-3, 0.0113, 0.1, 1.0, 20.0])


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e-3), (1.37e-3, 1.37e-3), (0.1, 0.1), (1e-3, 0.1), (20.0, 20.0)])
def test_the_selective_scan_is_exact_at_length_4096(low: float, high: float) -> None:
    """With Hymba's rates, decays near 1 and near 0: both ends of its step's range, and far above."""
    x, _, _, b, c = arguments("selective_scan", SIZES | {"batch": 1, "sequence": LONG}, 3)
    a = -torch.arange(1.0, SIZES["state"] + 1, dtype=torch.float64)[None]
    delta = torch.linspace(low, high, LONG, dtype=torch.float64)[None, :, None].expand(1, LONG, SIZES["channels"])
    exact_at_length("selective_scan", (x, delta.contiguous(), a, b, c))


@each_rate
def test_the_linear_scan_is_exact_at_length_4096(rate: float) -> None:
    x, _ = arguments("linear_scan", SIZES | {"batch": 1, "sequence": LONG}, 3)
    exact_at_length("linear_scan", (x, torch.full_like(x[..., :1], -rate)))


@pytest.mark.parametrize("rate", [1.0, 30.0, math.inf])
def test_nothing_is_left_of_a_past_that_has_decayed(rate: float) -> None:
    """Each frame is right for itself, however much larger those before it were."""
    x, _ = arguments("linear_scan", SIZES | {"sequence": 200})
    x = x * torch.exp(3 * torch.randn(2, 200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    _, linked = lower("linear_scan", SIZES, given=(x, torch.full_like(x[..., :1], -rate)))
    exact = ops.linear_scan(x.float().double(), torch.full_like(x[..., :1], -rate))
    np.testing.assert_allclose(run(linked, [x, torch.full_like(x[..., :1], -rate)]), exact, rtol=3e-5)


@each_rate
def test_the_diagonal_scan_is_exact_at_length_4096(rate: float) -> None:
    x, _, b, c = arguments("diagonal_scan", SIZES | {"batch": 1, "sequence": LONG}, 3)
    exact_at_length("diagonal_scan", (x, -rate * torch.arange(1.0, SIZES["state"] + 1, dtype=torch.float64), b, c))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 31, 64, 65, 1000, LONG])
def test_the_fft_conv_is_exact_for_every_window(window: int) -> None:
    """And for every length up to it; a longer sequence is refused by the graph itself."""
    x, kernel = arguments("fft_conv", SIZES | {"sequence": window}, 3)
    kernel = kernel[:window]
    _, linked = lower("fft_conv", SIZES, given=(x, kernel))
    for length in sorted({1, (window + 1) // 2, window - 1 or 1, window}):
        expected = ops.fft_conv(x[:, :length].float().double(), kernel.float().double()).numpy()
        assert np.abs(run(linked, [x[:, :length]]) - expected).max() <= 1e-6 * np.abs(expected).max()
    for length in (window + 1, window + 2, 2 * window + 3):
        with pytest.raises(ORT_ERRORS):
            run(linked, [torch.zeros(2, length, 3)])
