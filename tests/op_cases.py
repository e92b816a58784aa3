"""Arguments of every edifice op, and what of them is a sequence and what a memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from edifice_reference import ops

Sizes = dict[str, int]
Arguments = dict[str, Any]
Draw = Callable[..., Tensor]
Compute = Callable[[Arguments], tuple[Tensor, ...]]

SIZES: Sizes = {
    "batch": 2,
    "sequence": 9,
    "channels": 3,
    "state": 4,
    "groups": 2,
    "kernel": 4,
    "heads": 2,
    "window": 5,
    "sinks": 3,
    "prefix": 3,
}


def selective_scan(draw: Draw, n: Sizes) -> Arguments:
    frames = (n["batch"], n["sequence"])
    return {
        "x": draw(*frames, n["channels"]),
        "delta": torch.nn.functional.softplus(draw(*frames, n["channels"])),
        "a": -torch.exp(draw(n["channels"], n["state"])),
        "b": draw(*frames, n["state"]),
        "c": draw(*frames, n["state"]),
        "initial": draw(n["batch"], n["state"], n["channels"]),
    }


def linear_scan(draw: Draw, n: Sizes) -> Arguments:
    frames = (n["batch"], n["sequence"])
    return {
        "x": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*frames, 1)),
        "initial": draw(n["batch"], n["channels"]),
    }


def linear_scan_own(draw: Draw, n: Sizes) -> Arguments:
    """Every channel has decays of its own."""
    given = linear_scan(draw, n)
    return given | {"log_decay": -torch.exp(draw(*given["x"].shape))}


def diagonal_scan(draw: Draw, n: Sizes) -> Arguments:
    frames, each = (n["batch"], n["sequence"]), (n["groups"], n["state"])
    return {
        "x": draw(*frames, n["channels"]),
        "log_decay": -torch.exp(draw(*each)),
        "b": draw(*frames, *each),
        "c": draw(*frames, *each),
        "initial": draw(n["batch"], *each, n["channels"]),
    }


def cumulative_scan(draw: Draw, n: Sizes) -> Arguments:
    given = diagonal_scan(draw, n)
    del given["initial"]
    return given | {"epsilon": 1e-10}


def fft_conv(draw: Draw, n: Sizes) -> Arguments:
    x = draw(n["batch"], n["sequence"], n["channels"])
    return {"x": x, "kernel": draw(max(n["sequence"], 70), n["channels"])}


def causal_conv1d(draw: Draw, n: Sizes) -> Arguments:
    return {
        "x": draw(n["batch"], n["sequence"], n["channels"]),
        "weight": draw(n["channels"], 1, n["kernel"]),
        "bias": draw(n["channels"]),
        "groups": n["channels"],
        "past": draw(n["batch"], n["kernel"] - 1, n["channels"]),
    }


def causal_attention(draw: Draw, n: Sizes) -> Arguments:
    width, seen = n["heads"] * n["channels"], n["prefix"] + n["sequence"]
    return {
        "query": draw(n["batch"], n["sequence"], width),
        "key": draw(n["batch"], seen, width),
        "value": draw(n["batch"], seen, width),
        "num_heads": n["heads"],
        "epsilon": 1e-8,
    }


def sliding_attention(draw: Draw, n: Sizes) -> Arguments:
    ring = (n["batch"], n["heads"], n["window"], n["channels"])
    return causal_attention(draw, n | {"prefix": 0}) | {
        "past_key": draw(*ring),
        "past_value": draw(*ring),
        # Of each entry its own, before and after its ring is full.
        "position": (draw(n["batch"]).abs() * n["window"]).long(),
    }


def sliding_attention_sinks(draw: Draw, n: Sizes) -> Arguments:
    sinks = (n["sinks"], n["heads"] * n["channels"])
    return sliding_attention(draw, n) | {"sink_key": draw(*sinks), "sink_value": draw(*sinks)}


def floored_layer_norm(draw: Draw, n: Sizes) -> Arguments:
    # Every other frame has a variance far below the floor.
    x = draw(n["batch"], n["sequence"], 2 + n["channels"])
    x[:, ::2] *= 1e-5
    return {"x": x, "weight": draw(2 + n["channels"]), "bias": draw(2 + n["channels"]), "epsilon": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op and how to make its arguments.

    Attributes:
        streamed: the arguments that have a sequence axis.
        read_out: the one of them that has as many frames as the output: all, or the last ones.
        memory: the arguments that stand for the past, in the order in which the op gives them for what comes after.
    """

    op: str
    make: Callable[[Draw, Sizes], Arguments]
    streamed: tuple[str, ...]
    memory: tuple[str, ...] = ()
    read_out: str = "x"

    @property
    def entering(self) -> tuple[str, ...]:
        """The arguments that are inputs of a graph; the others are parameters or fixed."""
        return (*self.streamed, *self.memory, "position")

    def arguments(self, sizes: Sizes, seed: int = 0) -> Arguments:
        """Random ones in float64, by name, in the op's order."""
        generator = torch.Generator().manual_seed(seed)
        return self.make(lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64), sizes)

    def entering_arguments(self, sizes: Sizes, seed: int) -> Arguments:
        """Others for what enters, and the same as ever for the parameters."""
        given, drawn = self.arguments(SIZES | {"prefix": sizes["prefix"]}), self.arguments(sizes, seed)
        return {name: drawn[name] if name in self.entering else value for name, value in given.items()}

    def define(self, given: Arguments) -> tuple[Tensor, ...]:
        """What the op's torch definition gives, as a tuple in any case."""
        found = getattr(ops, self.op)(*given.values())
        return found if isinstance(found, tuple) else (found,)

    def piece(self, given: Arguments, frames: slice | int) -> Arguments:
        """Some of the frames, or a single one without the sequence axis."""
        return {name: value[:, frames] if name in self.streamed else value for name, value in given.items()}

    def after(self, given: Arguments, outputs: tuple[Tensor, ...], frames: int) -> Arguments:
        """The arguments, with the memory that an op left after so many frames."""
        given = given | dict(zip(self.memory, outputs[1:], strict=True))
        return given | {"position": given["position"] + frames} if "position" in given else given

    def in_pieces(self, compute: Compute, given: Arguments, cuts: Iterable[int]) -> tuple[Tensor, ...]:
        """A sequence cut before these frames, each piece from the memory that the last one left."""
        found, bounds = [], [0, *cuts, given[self.streamed[0]].shape[1]]
        for start, stop in itertools.pairwise(bounds):
            outputs = compute(self.piece(given, slice(start, stop)))
            found.append(outputs[0])
            given = self.after(given, outputs, stop - start)
        return torch.cat(found, dim=1), *outputs[1:]

    def by_frames(self, compute: Compute, given: Arguments) -> tuple[Tensor, ...]:
        """A sequence frame by frame, none of which has a sequence axis."""
        found = []
        for t in range(given[self.streamed[0]].shape[1]):
            outputs = compute(self.piece(given, t))
            found.append(outputs[0])
            given = self.after(given, outputs, 1)
        return torch.stack(found, dim=1), *outputs[1:]

    def without_memory(self, given: Arguments) -> tuple[Case, Arguments]:
        """The same from a state of zeros, which is not given."""
        case = dataclasses.replace(self, memory=())
        return case, {name: value for name, value in given.items() if name not in self.memory}

    def last(self, given: Arguments, frames: int) -> Arguments:
        """The arguments to read out the last frames alone."""
        return given | {self.read_out: given[self.read_out][:, -frames:]}


ATTENDING = ("query", "key", "value")
RINGS = ("past_key", "past_value")

CASES: dict[str, Case] = {
    "causal_attention": Case("causal_attention", causal_attention, ATTENDING, read_out="query"),
    "causal_conv1d": Case("causal_conv1d", causal_conv1d, ("x",), ("past",)),
    "cumulative_scan": Case("cumulative_scan", cumulative_scan, ("x", "b", "c"), read_out="c"),
    "diagonal_scan": Case("diagonal_scan", diagonal_scan, ("x", "b", "c"), ("initial",), "c"),
    "fft_conv": Case("fft_conv", fft_conv, ("x",)),
    "floored_layer_norm": Case("floored_layer_norm", floored_layer_norm, ("x",)),
    "linear_scan": Case("linear_scan", linear_scan, ("x", "log_decay"), ("initial",)),
    "linear_scan_own": Case("linear_scan", linear_scan_own, ("x", "log_decay"), ("initial",)),
    "selective_scan": Case("selective_scan", selective_scan, ("x", "delta", "b", "c"), ("initial",), "c"),
    "sliding_attention": Case("sliding_attention", sliding_attention, ATTENDING, RINGS, "query"),
    "sliding_attention_sinks": Case("sliding_attention", sliding_attention_sinks, ATTENDING, RINGS, "query"),
}
"""By name of an op, or of a way to call one. An op without an entry fails the tests."""

each_op = pytest.mark.parametrize("name", list(CASES))
each_op_with_a_memory = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.memory])
each_op_that_reads_out = pytest.mark.parametrize(
    "name", ["causal_attention", "cumulative_scan", "diagonal_scan", "selective_scan"]
)
"""Those that may read out the last frames alone."""

each_op_of_a_shared_memory = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.memory and case.memory != RINGS]
)
"""Those whose memory may be one for all of the batch."""


def arguments(name: str, **sizes: int) -> Arguments:
    """Those of CASES, of SIZES but for these."""
    return CASES[name].arguments(SIZES | sizes)
