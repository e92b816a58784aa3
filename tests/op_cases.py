"""Arguments of every op that is registered, a stranger's among them, and what can be done with them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import strangers.leaky_scan  # noqa: F401
import torch
from torch import Tensor

from edifice_export.lowerings import LOWERINGS
from edifice_reference.ops.op import Case as MakesArguments
from edifice_reference.ops.op import DeclaredOp

Sizes = dict[str, int]
Arguments = dict[str, Any]
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


@dataclasses.dataclass(frozen=True)
class Case:
    """An op, and one way to call it.

    Attributes:
        op: what was declared.
        make: its arguments.
        from_zeros: whether the states that may be left out are.
    """

    op: DeclaredOp[..., Any]
    make: MakesArguments
    from_zeros: bool = False

    @property
    def streamed(self) -> tuple[str, ...]:
        """The arguments that have a sequence axis."""
        return self.op.streamed

    @property
    def memory(self) -> tuple[str, ...]:
        """The arguments that stand for the past, in the order in which the op gives them for what comes after."""
        return () if self.from_zeros else self.op.states

    @property
    def read_out(self) -> str:
        """The argument that has as many frames as the output: all, or the last ones."""
        return self.op.read_out or self.op.streamed[0]

    @property
    def counters(self) -> set[str]:
        """The arguments that count frames."""
        return {*self.op.integers} - {*self.streamed}

    @property
    def entering(self) -> tuple[str, ...]:
        """The arguments that are inputs of a graph; the others are parameters or fixed."""
        return tuple(name for name in self.op.inputs if name in {*self.streamed, *self.memory, *self.op.integers})

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
        found = self.op(*given.values())
        return found if isinstance(found, tuple) else (found,)

    def piece(self, given: Arguments, frames: slice | int) -> Arguments:
        """Some of the frames, or a single one without the sequence axis."""
        return {name: value[:, frames] if name in self.streamed else value for name, value in given.items()}

    def after(self, given: Arguments, outputs: tuple[Tensor, ...], frames: int) -> Arguments:
        """The arguments, with the memory that an op left after so many frames."""
        given = given | dict(zip(self.memory, outputs[1:], strict=True))
        return given | {name: given[name] + frames for name in self.counters}

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
        case = dataclasses.replace(self, from_zeros=True)
        return case, {name: value for name, value in given.items() if name not in self.memory}

    def last(self, given: Arguments, frames: int) -> Arguments:
        """The arguments to read out the last frames alone."""
        return given | {self.read_out: given[self.read_out][:, -frames:]}


def _cases() -> dict[str, Case]:
    """Every way in which every op is called, by the op's name and, beside the first, the maker's."""
    found = {}
    for op in (known.declared for known in LOWERINGS.values()):
        for make in op.cases:
            name = op.name if make is op.cases[0] else f"{op.name}_{make.__name__.strip('_')}"
            found[name] = Case(op, make)
    return found


CASES = _cases()

each_op = pytest.mark.parametrize("name", list(CASES))
each_op_with_a_memory = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.memory])
each_op_that_reads_out = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op.read_out])
"""Those that may read out the last frames alone."""

FROM_ZEROS = [name for name, case in CASES.items() if case.op.fresh < len(case.op.inputs)]
"""Those that may be without a memory."""

each_op_of_a_shared_memory = pytest.mark.parametrize("name", FROM_ZEROS)
"""Theirs may be one for all of the batch, too."""


def arguments(name: str, **sizes: int) -> Arguments:
    """Those of CASES, of SIZES but for these."""
    return CASES[name].arguments(SIZES | sizes)
