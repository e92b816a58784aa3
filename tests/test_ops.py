"""The torch definitions of the ops: what they compute, their gradients, and their memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    CASES,
    SIZES,
    Arguments,
    arguments,
    each_op,
    each_op_of_a_shared_memory,
    each_op_that_reads_out,
    each_op_with_a_memory,
)
from torch import Tensor, nn

from edifice_reference import ops

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def with_gradients(given: Arguments) -> tuple[Any, ...]:
    return tuple(
        value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in given.values()
    )


@each_op
def test_gradients_are_those_of_the_definition(name: str) -> None:
    """Of every output, states among them, by every input."""
    assert torch.autograd.gradcheck(CASES[name].op, with_gradients(arguments(name, sequence=4)))


@each_op_with_a_memory
def test_gradients_of_one_frame_are_those_of_the_definition(name: str) -> None:
    frame = CASES[name].piece(arguments(name), 0)
    assert torch.autograd.gradcheck(CASES[name].op, with_gradients(frame))


@each_op_with_a_memory
def test_gradients_reach_the_past_through_the_state_alone(name: str) -> None:
    case = CASES[name]
    given = arguments(name, sequence=2)
    for memory in case.memory:
        given[memory].requires_grad_()
    sum(state.sum() for state in case.define(given)[1:]).backward()
    assert all(given[memory].grad.any() for memory in case.memory)


@each_op
def test_torch_accepts_the_op(name: str) -> None:
    case = CASES[name]
    torch.library.opcheck(case.op.registered, tuple(arguments(name).values()))


@each_op_with_a_memory
def test_torch_accepts_one_frame(name: str) -> None:
    case = CASES[name]
    frame = case.piece(arguments(name), 0)
    torch.library.opcheck(case.op.registered, tuple(frame.values()))


@each_op
def test_torch_accepts_arguments_of_any_layout(name: str) -> None:
    case = CASES[name]
    turned = {
        key: value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, Tensor) else value
        for key, value in arguments(name).items()
    }
    torch.library.opcheck(case.op.registered, tuple(turned.values()), test_utils="test_faketensor")


@each_op
def test_an_op_gives_a_state_for_every_memory_that_it_takes(name: str) -> None:
    case, given = CASES[name], arguments(name)
    _, *states = case.define(given)
    assert [state.shape for state in states] == [given[memory].shape for memory in case.memory]
    assert len(case.op.registered._schema.returns) == case.op.outputs == 1 + len(case.memory)


@each_op
def test_an_op_changes_none_of_its_arguments(name: str) -> None:
    case, given = CASES[name], arguments(name)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
    case.define(given)
    assert all(torch.equal(value, before[key]) for key, value in given.items() if isinstance(value, Tensor))


sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "sequence": st.integers(2, 24),
        "channels": st.integers(1, 3),
        "state": st.integers(1, 4),
        "groups": st.integers(1, 3),
        "kernel": st.integers(1, 5),
        "heads": st.integers(1, 3),
        "window": st.integers(1, 7),
        "sinks": st.integers(1, 3),
    }
)


@each_op_with_a_memory
@settings(max_examples=40, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 1000), data=st.data())
def test_a_sequence_cut_anywhere_is_the_whole(name: str, sizes: dict[str, int], seed: int, data: st.DataObject) -> None:
    case = CASES[name]
    given = case.arguments(SIZES | sizes, seed)
    cut = data.draw(st.integers(1, sizes["sequence"] - 1), "cut")
    for found, whole in zip(case.in_pieces(case.define, given, [cut]), case.define(given), strict=True):
        torch.testing.assert_close(found, whole, **EXACT)


@each_op_with_a_memory
@settings(max_examples=20, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 1000))
def test_frame_by_frame_is_the_whole(name: str, sizes: dict[str, int], seed: int) -> None:
    case = CASES[name]
    given = case.arguments(SIZES | sizes, seed)
    for found, whole in zip(case.by_frames(case.define, given), case.define(given), strict=True):
        torch.testing.assert_close(found, whole, **EXACT)


@each_op_of_a_shared_memory
def test_one_memory_serves_every_entry_of_a_batch(name: str) -> None:
    case, given = CASES[name], arguments(name)
    shared = given | {memory: given[memory][:1] for memory in case.memory}
    each = given | {memory: given[memory][:1].expand_as(given[memory]).contiguous() for memory in case.memory}
    for one, many in ((shared, each), (case.piece(shared, 0), case.piece(each, 0))):
        for found, expected in zip(case.define(one), case.define(many), strict=True):
            assert torch.equal(found, expected)


@each_op_of_a_shared_memory
@pytest.mark.parametrize("is_frame", [False, True])
def test_no_memory_is_one_of_zeros(name: str, is_frame: bool) -> None:
    case, given = CASES[name], arguments(name)
    given = case.piece(given, 0) if is_frame else given
    zeros = given | {memory: torch.zeros_like(given[memory]) for memory in case.memory}
    fresh, less = case.without_memory(given)
    for found, expected in zip(fresh.define(less), case.define(zeros), strict=True):
        assert torch.equal(found, expected)
    torch.library.opcheck(case.op.registered, tuple(less.values()))


@each_op_that_reads_out
@pytest.mark.parametrize("frames", [1, 3, SIZES["sequence"]])
def test_read_outs_of_the_last_frames_are_the_last_of_all(name: str, frames: int) -> None:
    case, given = CASES[name], arguments(name)
    last = case.last(given, frames)
    (found, *state), (expected, *state_expected) = case.define(last), case.define(given)
    torch.testing.assert_close([found, *state], [expected[:, -frames:], *state_expected], **EXACT)
    torch.library.opcheck(case.op.registered, tuple(last.values()))


@pytest.mark.parametrize("name", ["cumulative_scan", "diagonal_scan", "selective_scan"])
def test_more_read_outs_than_frames_are_refused(name: str) -> None:
    given = arguments(name)
    given["c"] = torch.cat([given["c"], given["c"]], dim=1)
    with pytest.raises(ValueError, match="there are 18 read-outs of 9 frames"):
        CASES[name].define(given)


def test_selective_scan_is_the_recurrence() -> None:
    x, delta, a, b, c, initial = arguments("selective_scan").values()
    y, state = ops.selective_scan(x, delta, a, b, c, initial)
    for channel in range(SIZES["channels"]):
        h = initial[0, :, channel].numpy().copy()
        for t in range(SIZES["sequence"]):
            for n in range(SIZES["state"]):
                h[n] = math.exp(delta[0, t, channel] * a[channel, n]) * h[n] + b[0, t, n] * x[0, t, channel]
            expected = sum(float(c[0, t, n]) * h[n] for n in range(SIZES["state"]))
            assert y[0, t, channel].item() == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(state[0, :, channel], h, atol=1e-12)


def test_linear_scan_is_the_recurrence() -> None:
    x, _, initial = arguments("linear_scan").values()
    log_decay = -torch.rand(x.shape, dtype=torch.float64)
    found, state = ops.linear_scan(x, log_decay, initial)
    h = initial.numpy()
    for t in range(SIZES["sequence"]):
        h = np.exp(log_decay[:, t].numpy()) * h + x[:, t].numpy()
        np.testing.assert_allclose(found[:, t], h, atol=1e-12)
    np.testing.assert_allclose(state, h, atol=1e-12)
    shared = ops.linear_scan(x, log_decay[..., :1], initial)
    torch.testing.assert_close(shared, ops.linear_scan(x, log_decay[..., :1].expand_as(x).contiguous(), initial))


def test_diagonal_scan_is_a_selective_scan_of_constant_decay_for_each_group() -> None:
    x, log_decay, b, c, initial = arguments("diagonal_scan").values()
    y, state = ops.diagonal_scan(x, log_decay, b, c, initial)
    for group in range(SIZES["groups"]):
        expected, expected_state = ops.selective_scan(
            x, torch.ones_like(x), log_decay[None, group], b[:, :, group], c[:, :, group], initial[:, group]
        )
        torch.testing.assert_close(y[:, :, group], expected, **EXACT)
        torch.testing.assert_close(state[:, group], expected_state, **EXACT)


def test_cumulative_scan_is_a_quotient_of_cumulative_products() -> None:
    x, log_decay, b, c, epsilon = arguments("cumulative_scan", sequence=600).values()
    found = ops.cumulative_scan(x, log_decay, b, c, epsilon)
    for group in range(SIZES["groups"]):
        product = torch.exp(torch.cumsum(log_decay[group].expand(600, -1), 0))[None, :, None]
        h = product * torch.cumsum(b[:, :, group, None] * x[..., None] / (product + epsilon), 1)
        expected = (c[:, :, group, None] * h).sum(-1)
        torch.testing.assert_close(found[:, :, group], expected, rtol=1e-9, atol=1e-9)


def test_cumulative_scan_is_exact_until_something_has_decayed() -> None:
    x, log_decay, b, c, epsilon = arguments("cumulative_scan", sequence=60).values()
    nothing = x.new_zeros(1, *log_decay.shape, x.shape[2])
    exact, _ = ops.diagonal_scan(x, log_decay / 30, b, c, nothing)
    error = (ops.cumulative_scan(x, log_decay / 30, b, c, epsilon) - exact).abs().amax(dim=(0, 2, 3))
    assert error[:5].max() < 1e-8
    far = (ops.cumulative_scan(x, log_decay, b, c, epsilon) - ops.diagonal_scan(x, log_decay, b, c, nothing)[0]).abs()
    assert far[:, 40:].amax(dim=(0, 1, 3)).min() > 0.1


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
    x, weight, bias, groups, past = arguments("causal_conv1d").values()
    y, state = ops.causal_conv1d(x, weight, bias, groups, past)
    seen = torch.cat([past, x], dim=1)
    for t in range(SIZES["sequence"]):
        taps = [weight[1, 0, k] * seen[0, t + k, 1] for k in range(4)]
        assert y[0, t, 1].item() == pytest.approx(float(sum(taps) + bias[1]), abs=1e-12)
    assert torch.equal(state, x[:, -3:])


def test_causal_conv1d_before_whose_first_frame_was_nothing_sees_its_own_frames_only() -> None:
    x, weight, bias, groups, past = arguments("causal_conv1d").values()
    y, _ = ops.causal_conv1d(x, weight, bias, groups, torch.zeros_like(past))
    for t in range(SIZES["sequence"]):
        taps = [weight[1, 0, k] * x[0, t - 3 + k, 1] for k in range(4) if t - 3 + k >= 0]
        assert y[0, t, 1].item() == pytest.approx(float(sum(taps) + bias[1]), abs=1e-12)


def test_causal_conv1d_refuses_groups_that_are_not_channels() -> None:
    x, weight, bias, groups, past = arguments("causal_conv1d").values()
    with pytest.raises(ValueError, match=r"has 3 groups and a weight \[3, 1, kernel\], got 1 and \[3, 1, 4\]"):
        ops.causal_conv1d(x, weight, bias, 1, past)
    with pytest.raises(ValueError, match=r"got 3 and \[3, 3, 4\]"):
        ops.causal_conv1d(x, weight.expand(-1, 3, -1).contiguous(), bias, groups, past)


def test_causal_conv1d_is_torchs() -> None:
    x, weight, bias, groups, past = arguments("causal_conv1d").values()
    seen = torch.cat([past, x], dim=1).transpose(1, 2)
    expected = nn.functional.conv1d(seen, weight, bias, groups=groups).transpose(1, 2)
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias, groups, past)[0], expected, **EXACT)


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_causal_attention_is_torchs(epsilon: float) -> None:
    query, key, value, heads, _ = arguments("causal_attention").values()
    length, seen = SIZES["sequence"], SIZES["sequence"] + SIZES["prefix"]
    mask = torch.ones(length, seen).tril(SIZES["prefix"]).bool()
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    found = ops.causal_attention(query, key, value, heads, epsilon)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 if epsilon else 1e-12)
    assert torch.equal(found, expected) is False or epsilon == 0


@pytest.mark.parametrize("name", ["causal_attention", "sliding_attention", "sliding_attention_sinks"])
def test_attention_refuses_an_epsilon_that_float32_would_see(name: str) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        CASES[name].define(arguments(name) | {"epsilon": 1e-6})


def test_floored_layer_norm_is_torchs_above_the_floor_and_a_scaling_below() -> None:
    x, weight, bias, epsilon = arguments("floored_layer_norm").values()
    found = ops.floored_layer_norm(x, weight, bias, epsilon)
    expected = nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    torch.testing.assert_close(found[:, 1::2], expected[:, 1::2])
    small = x[:, ::2]
    scaled = (small - small.mean(-1, keepdim=True)) / epsilon**0.5 * weight + bias
    torch.testing.assert_close(found[:, ::2], scaled)
