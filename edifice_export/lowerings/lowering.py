"""What a lowering is, and what is known of a node when one is chosen for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OnnxFunction

from edifice_reference.ops.op import DeclaredOp

from ..defaults import TARGETS
from ..errors import CheckError

__all__ = ["Body", "Call", "Choice", "Lowering", "Op"]

Body = OnnxFunction[..., Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """A node of an edifice op, as far as the choice of its body depends on it.

    Attributes:
        shapes: of every input: sizes, those that are free by their symbol; None for an input of which nothing is known.
        expected: the same with the number that a free size is made for: the window for a sequence, 1 for a batch;
            None where any number may come.
        constants: the values of inputs that no input of the graph changes, None for the others.
        target: what the graph is lowered for, one of defaults.TARGETS.
    """

    shapes: tuple[tuple[int | str | None, ...] | None, ...]
    expected: tuple[tuple[int | None, ...] | None, ...]
    constants: tuple[np.ndarray | None, ...] = ()
    target: str = "portable"

    @property
    def scans(self) -> bool:
        """Whether the target is good at Scan."""
        return TARGETS[self.target]

    def size(self, index: int, axis: int) -> int | None:
        """The number that an input's size is made for, None where any may come."""
        shape = self.expected[index]
        return shape[axis] if shape is not None else None


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One body of an op.

    Attributes:
        name: what it is called among the op's lowerings.
        body: takes the op's inputs. A node without an initial state is given one of zeros if the body takes one.
        is_frame: for one frame in place of a sequence.
        takes: whether the body computes a node, of which it is known that inputs and form fit.
        sizes: attributes that the body has and the op has not, each a known size: an input and its axis.
    """

    name: str
    body: Body
    is_frame: bool = False
    takes: Callable[[Call], bool] = lambda _: True
    sizes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """How many it takes."""
        return len(self.body.to_function_proto().input)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The lowering of a node, and why it is this one."""

    lowering: Lowering
    why: str


@dataclasses.dataclass(frozen=True)
class Op:
    """All lowerings of an op.

    Attributes:
        declared: what the op is.
        lowerings: every body, for sequences (or whatever else the op takes) and for single frames.
        prefer: of those that fit a node, the name of the one to take and why; not asked where only one fits.
        last: of a node, new ones that give its first output at the last frame alone, the last of them that output; none
            where there is nothing cheaper than all frames.
    """

    declared: DeclaredOp[..., Any]
    lowerings: tuple[Lowering, ...]
    prefer: Callable[[Call], tuple[str, str]] | None = None
    last: Callable[[ir.Node], Sequence[ir.Node]] | None = None

    @property
    def domain(self) -> str:
        """Of its nodes."""
        return self.declared.namespace

    @property
    def op_type(self) -> str:
        """What its nodes are called, such as SelectiveScan."""
        return "".join(part.capitalize() for part in self.declared.name.split("_"))

    def of_frame(self, call: Call) -> bool:
        """Whether a node computes one frame in place of a sequence."""
        shape = call.shapes[0]
        return shape is not None and self.declared.is_frame(len(shape))

    def fitting(self, call: Call) -> list[Lowering]:
        """The lowerings that compute a node: with its inputs, or else with states of zeros besides."""
        given, every = len(call.shapes), len(self.declared.inputs)
        is_frame = self.of_frame(call)
        right = [each for each in self.lowerings if not self.declared.states or each.is_frame == is_frame]
        numbers = dict.fromkeys([given, every] if given >= self.declared.fresh else [given])
        named: dict[str, Lowering] = {}
        for each in (each for inputs in numbers for each in right if each.inputs == inputs and each.takes(call)):
            named.setdefault(each.name, each)
        return list(named.values())

    def choose(self, call: Call) -> Choice | None:
        """The lowering of a node, or None if there is none.

        Raises:
            CheckError: the one that is preferred doesn't fit.
        """
        fitting = {each.name: each for each in self.fitting(call)}
        if len(fitting) <= 1 or self.prefer is None:
            first = next(iter(fitting.values()), None)
            return first and Choice(first, "the only one" if len(fitting) == 1 else "the first that fits")
        name, why = self.prefer(call)
        if name not in fitting:
            raise CheckError(f"of {self.declared.qualified} {name!r} is preferred; what fits is {', '.join(fitting)}")
        return Choice(fitting[name], why)
