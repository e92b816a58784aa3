"""The reference models frame by frame: against themselves at once, and against what they must remember and forget."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import USUAL, Streamed, each_stream, make, sequence
from torch import Tensor

from edifice_reference.models.config import OptionError
from edifice_reference.models.registry import ARCHITECTURES
from edifice_reference.models.state import State, kind_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FRAMES = 3 * TINY["window_size"] + 4


def by_steps(model: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for t in range(x.shape[1]):
        output, state = model.step(x[:, t], state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


@each_stream
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_frame_by_frame_is_the_stream_at_once(case: Streamed, batch: int) -> None:
    model, x = case.make(), sequence(batch, FRAMES)
    found, state = by_steps(model, x, model.initial_state(batch))
    expected, after = model.extend(x, model.initial_state(batch))
    torch.testing.assert_close(found, expected, **EXACT)
    assert torch.equal(model.forward_stream(x), expected)
    assert_same(state, after)


@each_stream
def test_the_first_window_of_a_stream_is_a_window(case: Streamed) -> None:
    model, x = case.make(), sequence(2, FRAMES)
    window = model.config.window_size
    expected = model.forward_prefixes(x[:, :window])
    torch.testing.assert_close(model.forward_stream(x)[:, :window], expected, **EXACT)
    torch.testing.assert_close(model.forward_stream(x[:, :window])[:, -1], model(x[:, :window]), **EXACT)


@each_stream
@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(0, 12), min_size=1, max_size=8), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_stream_in_any_pieces_is_the_stream_at_once(case: Streamed, pieces: list[int], batch: int, seed: int) -> None:
    """0 stands for one frame without the sequence axis."""
    model, x = case.make(), sequence(batch, sum(max(piece, 1) for piece in pieces), seed=seed)
    state, outputs, start = model.initial_state(batch), [], 0
    for piece in pieces:
        stop = start + max(piece, 1)
        output, state = model.extend(x[:, start:stop], state) if piece else model.step(x[:, start], state)
        outputs.append(output if piece else output[:, None])
        start = stop
    expected, after = model.extend(x, model.initial_state(batch))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **EXACT)
    assert_same(state, after)


@each_stream
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_state_is_named_finite_tensors_with_a_batch(case: Streamed, batch: int) -> None:
    model = case.make()
    state = before = model.initial_state(batch)
    for after in (model.step(sequence(batch, 1)[:, 0], before)[1], model.extend(sequence(batch, 9), before)[1], before):
        assert list(after) == list(before)
        for name, value in after.items():
            assert re.fullmatch(r"\d+\.(ssm|conv|key|value|long_conv|position)", name)
            assert value.shape == before[name].shape
            assert value.shape[0] == batch
            assert value.numel() > 0
            assert value.isfinite().all()
            assert value.dtype == (torch.int64 if name.endswith("position") else torch.float64)
    assert {int(name.partition(".")[0]) for name in state} == set(range(TINY["num_layers"]))


@each_stream
def test_a_position_counts_the_frames_of_each_entry(case: Streamed) -> None:
    model = case.make()
    state = model.initial_state(2)
    if "0.position" not in state:
        assert not any(name.endswith(("key", "value")) for name in state)
        return
    state["0.position"] += torch.tensor([0, 5])
    _, state = model.extend(sequence(2, 4), state)
    _, state = model.step(sequence(2, 1)[:, 0], state)
    assert state["0.position"].tolist() == [5, 10]


@each_stream
@pytest.mark.parametrize("frames", [0, 1, 11])
def test_the_state_that_was_given_is_not_changed(case: Streamed, frames: int) -> None:
    model = case.make()
    _, state = model.extend(sequence(2, 9), model.initial_state(2))
    before = copied(state)
    piece = sequence(2, frames, seed=1) if frames else sequence(2, 1, seed=1)[:, 0]
    _, after = model.extend(piece, state)
    # Nor is memory shared: writing to the one leaves the other as it was.
    for value in after.values():
        value.zero_()
    for name, value in state.items():
        assert torch.equal(value, before[name])


@each_stream
def test_entries_of_a_batch_are_independent(case: Streamed) -> None:
    model, x = case.make(), sequence(4, FRAMES)
    order = torch.tensor([2, 0, 3, 1])
    outputs, state = by_steps(model, x, model.initial_state(4))
    permuted, permuted_state = by_steps(model, x[order], model.initial_state(4))
    torch.testing.assert_close(permuted, outputs[order], **EXACT)
    assert_same(permuted_state, {name: value[order] for name, value in state.items()})
    alone, _ = by_steps(model, x[2:3], model.initial_state(1))
    torch.testing.assert_close(alone, outputs[2:3], **EXACT)


@each_stream
def test_an_entry_that_is_given_its_initial_state_starts_anew(case: Streamed) -> None:
    """The others go on."""
    model, x = case.make(), sequence(3, FRAMES)
    first, state = by_steps(model, x[:, :10], model.initial_state(3))
    for name, value in model.initial_state(1).items():
        state[name][1] = value[0]
    rest, _ = by_steps(model, x[:, 10:], state)
    expected = model.forward_stream(x)
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[[0, 2]], expected[[0, 2]], **EXACT)
    torch.testing.assert_close(rest[1:2], model.forward_stream(x[1:2, 10:]), **EXACT)


@each_stream
def test_every_entry_starts_from_the_same_state_and_has_its_own(case: Streamed) -> None:
    model = case.make()
    one, many = model.initial_state(), model.initial_state(3)
    assert_same(many, {name: value.expand(3, *value.shape[1:]) for name, value in one.items()})
    for value in many.values():
        value[1] += 1
    assert_same({name: value[[0, 2]] for name, value in many.items()}, model.initial_state(2))


@each_stream
def test_gradients_go_through_states(case: Streamed) -> None:
    model, x = case.make(num_layers=1), sequence(2, 12)
    with torch.enable_grad():
        found, state = model.extend(x[:, :5], model.initial_state(2))
        found = torch.cat([found, model.extend(x[:, 5:], state)[0]], dim=1)
        expected = model.forward_stream(x)
        pairs = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_edifices_h3_has_no_stream() -> None:
    assert make(ARCHITECTURES["h3"], "standard").why_no_stream is None
    model = make(ARCHITECTURES["h3"], "edifice")
    assert model.why_no_stream.startswith("h3 with edifice numerics has no stream: Edifice's recurrence is a quotient")
    for attempt in (model.initial_state, lambda: model.forward_stream(sequence(1, 3))):
        with pytest.raises(OptionError, match="h3 with edifice numerics has no stream"):
            attempt()


def without_recurrence(model: Any) -> Any:
    """Of models with two paths, attention alone."""
    for block in model.blocks:
        path = block.mamba if hasattr(block, "mamba") else block.ssm
        path.out_proj.weight.zero_()
        path.out_proj.bias.zero_()
    return model


attention_alone = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ss_transformer", {}),
        ("ss_transformer", {"window_size": 1}),
        ("hymba", {}),
        ("hymba", {"num_meta_tokens": 0}),
        ("hymba", {"meta_propagation": True}),
    ],
)


@attention_alone
def test_attention_sees_the_last_window(name: str, options: dict[str, Any]) -> None:
    """Of one layer, and the meta tokens for ever: each output is that of the window which ends there."""
    model = without_recurrence(make(ARCHITECTURES[name], num_layers=1, **options))
    x, window = sequence(2, FRAMES), model.config.window_size
    found = model.forward_stream(x)
    for t in range(window - 1, FRAMES):
        torch.testing.assert_close(found[:, t], model(x[:, t + 1 - window : t + 1]), **EXACT)
    # A window without a limit sees more.
    assert (model.forward_prefixes(x) - found)[:, window:].abs().amax(dim=(0, 2)).min() > 1e-6


def traces(model: Any, reach: int) -> tuple[Tensor, dict[str, bool]]:
    """What frames leave that are followed by others.

    Returns:
        By how much each of the frames after them differs, up to the first that is out of reach; and whether the state
        after that differs.
    """
    frames = sequence(2, 5 + reach + 1)
    other = torch.cat([sequence(2, 5, seed=1), frames[:, 5:]], dim=1)
    (one, state), (two, other_state) = (by_steps(model, x, model.initial_state(2)) for x in (frames, other))
    return (one - two)[:, 5:].abs().amax(dim=(0, 2)), {
        name: not torch.equal(value, other_state[name]) for name, value in state.items()
    }


@attention_alone
@pytest.mark.parametrize("layers", [1, 3])
def test_attention_forgets_what_is_out_of_its_reach(name: str, options: dict[str, Any], layers: int) -> None:
    """A frame reaches as many windows as there are layers, and not one frame further."""
    model = without_recurrence(make(ARCHITECTURES[name], num_layers=layers, **{"window_size": 4, **options}))
    reach = layers * (model.config.window_size - 1)
    difference, _ = traces(model, reach)
    assert (difference[:reach] > 0).all()
    assert not difference[reach:].any()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_hyena_forgets_what_is_out_of_its_reach(order: int, layers: int) -> None:
    """Each order of each layer reaches a window, and the convolution before them two frames further."""
    reach = layers * (order * 3 + 2)
    difference, state = traces(make(ARCHITECTURES["hyena"], window_size=4, order=order, num_layers=layers), reach)
    assert (difference[:reach] > 0).all()
    assert not difference[reach:].any()
    assert not any(state.values())


def remembers(case: Streamed) -> bool:
    """Whether it has a recurrence."""
    return any(kind_of(name) == "ssm" for name in case.make().initial_state(1))


@pytest.mark.parametrize("case", [case for case in USUAL if remembers(case)], ids=str)
def test_recurrences_go_on_beyond_every_window(case: Streamed) -> None:
    difference, state = traces(case.make(), 5 * TINY["window_size"])
    assert (difference > 1e-12).all()
    assert all(different for name, different in state.items() if name.endswith("ssm"))


class TestHyena:
    """What is particular to Hyena."""

    architecture = ARCHITECTURES["hyena"]

    @pytest.mark.parametrize("order", [1, 2, 3])
    @pytest.mark.parametrize("window", [1, 2, 7])
    def test_it_is_the_sum_over_the_last_window(self, order: int, window: int) -> None:
        """A block by its definition, frame by frame."""
        model = make(self.architecture, embed_dim=8, order=order, num_layers=1, window_size=window)
        x, (block,) = sequence(2, FRAMES, 8), model.blocks
        u, _ = block.conv(block.norm(x), block.conv.initial_state(2))
        y, *gates = block.proj(u).chunk(order + 1, dim=-1)
        for make_filter, gate in zip(block.filters, gates, strict=True):
            f = make_filter()
            sums = [sum(f[age] * y[:, t - age] for age in range(min(t + 1, window))) for t in range(FRAMES)]
            y = torch.stack(sums, dim=1) * gate
        expected = x + block.out_proj(y)
        expected = model.final_norm(expected + block.ffn(block.ffn_norm(expected)))
        torch.testing.assert_close(model.forward_stream(x), expected, **EXACT)
        torch.testing.assert_close(by_steps(model, x, model.initial_state(2))[0], expected, **EXACT)


class TestHymba:
    """What is particular to Hymba."""

    architecture = ARCHITECTURES["hymba"]

    def test_propagated_meta_tokens_leave_the_state_that_feeding_them_leaves(self) -> None:
        """With the projection the identity."""
        options = {"embed_dim": 8, "meta_propagation": True}
        model = make(self.architecture, num_meta_tokens=3, **options)
        # A window in which meta tokens and seven frames have room.
        plain = make(self.architecture, num_meta_tokens=0, window_size=10, **options)
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "meta_tokens"})
        _, fed = plain.extend(model.meta_tokens.expand(2, -1, -1), plain.initial_state(2))
        state, sinks = model.initial_state(2), model.constants()
        for layer in range(2):
            for kind in ("ssm", "conv"):
                torch.testing.assert_close(state[f"{layer}.{kind}"], fed[f"{layer}.{kind}"], **EXACT)
            for kind in ("key", "value"):
                ring = fed[f"{layer}.{kind}"][0, :, :3].transpose(0, 1).flatten(1)
                torch.testing.assert_close(sinks[f"{layer}.sink_{kind}"], ring, **EXACT)
        x = sequence(2, 7, 8)
        torch.testing.assert_close(model.forward_stream(x), plain.extend(x, fed)[0], **EXACT)

    @pytest.mark.parametrize("options", [{}, {"meta_propagation": True}])
    def test_meta_tokens_are_seen_at_every_frame(self, options: dict[str, Any]) -> None:
        model, x = without_recurrence(make(self.architecture, **options)), sequence(1, FRAMES)
        before = model.forward_stream(x)
        for name, value in model.named_parameters():
            if "meta" in name:
                value.neg_()
        assert ((model.forward_stream(x) - before).abs().amax(dim=(0, 2)) > 1e-6).all()

    def test_no_meta_tokens_is_the_same_model_either_way(self) -> None:
        one, other = (make(self.architecture, num_meta_tokens=0, meta_propagation=way) for way in (False, True))
        assert one.constants() == other.constants() == {}
        assert torch.equal(one.forward_stream(sequence(2, FRAMES)), other.forward_stream(sequence(2, FRAMES)))
