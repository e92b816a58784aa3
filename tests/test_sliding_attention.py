"""Attention over a ring of keys and values, in torch and in ONNX, against attention over the whole history."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from lowered import Lowered, lower
from op_cases import CASES, Arguments, Compute
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edifice_reference import ops

WIDTH = 4
"""Of a head."""

each_window = pytest.mark.parametrize("window", [1, 2, 7])
each_heads = pytest.mark.parametrize("heads", [1, 2, 3])
each_sinks = pytest.mark.parametrize("sinks", [0, 1, 3])


def history(window: int, heads: int, sinks: int, length: int) -> tuple[Arguments, dict[str, Tensor]]:
    """Frames that go on from histories of several lengths, one for each entry of the batch.

    Returns:
        The arguments of the op, the epsilon 0; and keys and values of the histories and of the frames after them.
    """
    position = torch.tensor([0, 1, window - 1, window, window + 1, 3 * window + 2])
    batch, most = len(position), int(position.max())
    generator = torch.Generator().manual_seed(window + 10 * heads + 100 * length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    everything = {name: draw(batch, most + length, heads * WIDTH) for name in ("key", "value")}
    given: Arguments = {"query": draw(batch, length, heads * WIDTH)}
    rings = {}
    for name, values in everything.items():
        given[name] = torch.stack([values[entry, p : p + length] for entry, p in enumerate(position)])
        # A slot that no frame has filled holds what must not be seen.
        rings[f"past_{name}"] = ring_of(torch.full((batch, heads, window, WIDTH), 1e3), values, position)
    given |= {"num_heads": heads, "epsilon": 0.0, **rings, "position": position}
    if sinks:
        given |= {"sink_key": draw(sinks, heads * WIDTH), "sink_value": draw(sinks, heads * WIDTH)}
    return given, everything


def ring_of(empty: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """By its definition: each frame in turn in slot position modulo window."""
    ring = empty.double().clone()
    for entry, frames in enumerate(position):
        for frame in range(int(frames)):
            ring[entry, :, frame % ring.shape[2]] = values[entry, frame].view(ring.shape[1], WIDTH)
    return ring


def over_the_whole_history(given: Arguments, everything: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the op must give, from torch's attention with a mask, entry by entry."""
    heads, window, length = given["num_heads"], given["past_key"].shape[2], given["query"].shape[1]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads, WIDTH)).transpose(0, 1)

    outputs = []
    for entry, position in enumerate(given["position"].tolist()):
        own = torch.arange(position, position + length)[:, None]
        frames = torch.arange(position + length)
        seen = [everything[name][entry, : position + length] for name in ("key", "value")]
        mask = (frames <= own) & (frames > own - window)
        if "sink_key" in given:
            seen = [torch.cat([given[f"sink_{name}"], x]) for name, x in zip(("key", "value"), seen, strict=True)]
            mask = torch.cat([torch.ones(length, len(given["sink_key"]), dtype=torch.bool), mask], dim=1)
        y = scaled_dot_product_attention(split(given["query"][entry]), *map(split, seen), attn_mask=mask)
        outputs.append(y.transpose(0, 1).flatten(1))
    after = given["position"] + length
    rings = (ring_of(given[f"past_{name}"], everything[name], after) for name in ("key", "value"))
    return torch.stack(outputs), *rings


def case_of(given: Arguments) -> str:
    return "sliding_attention_sinks" if "sink_key" in given else "sliding_attention"


@functools.cache
def graph(heads: int, sinks: int, is_frame: bool) -> Lowered:
    given, _ = history(7, heads, sinks, 5)
    case = CASES[case_of(given)]
    # Sinks are inputs here, so that one graph serves several tests.
    return lower(case, case.piece(given, 0) if is_frame else given, (*case.entering, "sink_key", "sink_value"))


def in_torch(given: Arguments) -> tuple[Tensor, ...]:
    return CASES[case_of(given)].define(given)


def frame_by_frame(given: Arguments, compute: Compute) -> tuple[Tensor, ...]:
    return CASES[case_of(given)].by_frames(compute, given)


@each_window
@each_heads
@each_sinks
def test_it_is_attention_over_the_whole_history_with_a_mask(window: int, heads: int, sinks: int) -> None:
    """From no frame to four windows more, for entries at positions of their own."""
    for length in sorted({1, 2, window, window + 1, 4 * window}):
        given, everything = history(window, heads, sinks, length)
        expected = over_the_whole_history(given, everything)
        for found in (in_torch(given), frame_by_frame(given, in_torch)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_window
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("sinks", [0, 3])
def test_its_graphs_are_attention_over_the_whole_history_with_a_mask(window: int, heads: int, sinks: int) -> None:
    for length in sorted({1, 2, window, window + 1, 4 * window}):
        given, everything = history(window, heads, sinks, length)
        expected = over_the_whole_history(given, everything)
        for found in (graph(heads, sinks, False)(given), frame_by_frame(given, graph(heads, sinks, True))):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


each_way = pytest.mark.parametrize("way", ["torch", "onnx"])


def frame_of(way: str, heads: int, sinks: int) -> Callable[[Arguments], tuple[Tensor, ...]]:
    return in_torch if way == "torch" else graph(heads, sinks, True)


@each_window
@each_way
def test_one_frame_changes_the_slot_of_its_position_alone(window: int, way: str) -> None:
    given, _ = history(window, 3, 0, 1)
    frame = CASES["sliding_attention"].piece(given, 0)
    # As the graphs have them.
    frame = {
        name: value.float().double() if name != "position" and isinstance(value, Tensor) else value
        for name, value in frame.items()
    }
    _, key, value = frame_of(way, 3, 0)(frame)
    for entry, position in enumerate(given["position"].tolist()):
        for slot in range(window):
            for ring, past, new in ((key, "past_key", "key"), (value, "past_value", "value")):
                new_here = slot == position % window
                expected = frame[new][entry].view(3, WIDTH) if new_here else frame[past][entry, :, slot]
                assert torch.equal(ring[entry, :, slot], expected)


@pytest.mark.parametrize("length", [1, 7, 30])
@each_way
def test_only_the_place_in_the_ring_matters_of_a_position(length: int, way: str) -> None:
    """However long a stream has been running: at 60 frames a second, for a thousand years."""
    given, _ = history(7, 3, 3, length)
    given["position"] += 7
    later = given | {"position": given["position"] + 7 * 500_000_000_000}
    compute = in_torch if way == "torch" else graph(3, 3, False)
    assert all(map(torch.equal, compute(given), compute(later)))
    if length == 1:
        given, later = (CASES["sliding_attention_sinks"].piece(each, 0) for each in (given, later))
        compute = frame_of(way, 3, 3)
        assert all(map(torch.equal, compute(given), compute(later)))


@each_sinks
def test_within_its_window_it_is_causal_attention(sinks: int) -> None:
    """From its start, with sinks as the prefix."""
    given, _ = history(7, 2, sinks, 7)
    given |= {"position": torch.zeros(6, dtype=torch.int64), "epsilon": 1e-8}
    key, value = given["key"], given["value"]
    if sinks:
        key, value = (torch.cat([given[f"sink_{name}"].expand(6, -1, -1), given[name]], 1) for name in ("key", "value"))
    expected = ops.causal_attention(given["query"], key, value, 2, 1e-8)
    torch.testing.assert_close(in_torch(given)[0], expected, rtol=1e-12, atol=1e-12)


def test_its_epsilon_is_added_to_the_denominator() -> None:
    given, _ = history(7, 2, 0, 9)
    with_epsilon, without = in_torch(given | {"epsilon": 1e-8})[0], in_torch(given)[0]
    torch.testing.assert_close(with_epsilon, without, rtol=0, atol=1e-7)
    assert not torch.equal(with_epsilon, without)


@pytest.mark.parametrize("sinks", [0, 3])
def test_it_is_exact_at_length_4096(sinks: int) -> None:
    """Where queries stand in many blocks, and frame by frame."""
    given, _ = history(60, 3, sinks, 4096)
    given = {
        name: value[2:3] if isinstance(value, Tensor) and "sink" not in name else value for name, value in given.items()
    }
    expected = in_torch(given)
    for found in (graph(3, sinks, False)(given), frame_by_frame(given, graph(3, sinks, True))):
        for value, wanted in zip(found, expected, strict=True):
            assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()
