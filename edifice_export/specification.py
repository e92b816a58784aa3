"""What goes into a graph and what comes out: names, types, sizes, what values there may be, and of which frame."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal, Self, get_args

__all__ = [
    "BATCH",
    "DTYPES",
    "KINDS",
    "PAST",
    "POSITIONS",
    "SEQUENCE",
    "InputSpec",
    "OutputSpec",
    "Position",
    "Shape",
    "Size",
    "Sizes",
    "StateSpec",
    "TensorSpec",
    "Values",
    "last_of",
    "shape_of",
]

_SUM = re.compile(r"[A-Za-z_]\w*( \+ [A-Za-z_]\w*)*( \+ \d{1,18})?")
_LAST = re.compile(r"min\((\d{1,18}), ([A-Za-z_]\w*)\)")


@dataclasses.dataclass(frozen=True)
class Size:
    """A free size: a symbol, a sum of symbols and a number, or of a symbol's frames the last n.

    What torch makes of other arithmetic, such as every second pixel's, stays as it wrote it in `other`.

    Attributes:
        symbols: what is summed.
        plus: a number that is added.
        last: at most so many, the last ones, of the one symbol.
        other: an expression that is none of these.
    """

    symbols: tuple[str, ...]
    plus: int = 0
    last: int | None = None
    other: str = ""

    def __str__(self) -> str:
        if self.other:
            return self.other
        if self.last is not None:
            return f"min({self.last}, {self.symbols[0]})"
        return " + ".join((*self.symbols, *([str(self.plus)] if self.plus else [])))

    @classmethod
    def parse(cls, text: str) -> Size:
        """The size that `str` of one gives."""
        if last := _LAST.fullmatch(text):
            return last_of(last[2], int(last[1]))
        if not _SUM.fullmatch(text):
            return cls((), other=text)
        terms = text.split(" + ")
        number = int(terms[-1]) if terms[-1].isdigit() else 0
        return cls(tuple(sorted(term for term in terms if not term.isdigit())), number)

    @property
    def symbol(self) -> str | None:
        """The symbol of a size that is nothing else."""
        return self.symbols[0] if len(self.symbols) == 1 and not self.plus and self.last is None else None

    def at(self, sizes: Mapping[str, int]) -> int | None:
        """The number that it is where its symbols stand for these, None where that is not known."""
        if self.other or any(symbol not in sizes for symbol in self.symbols):
            return None
        total = sum(sizes[symbol] for symbol in self.symbols) + self.plus
        return total if self.last is None else min(total, self.last)


def last_of(symbol: str, count: int) -> Size:
    """The last frames, `count` of them or as many as there are."""
    return Size((symbol,), last=count)


Shape = tuple[int | Size, ...]

Sizes = Mapping[str, int]
"""A number for each free size, by its symbol."""


def shape_of(*sizes: int | str | Size) -> Shape:
    """A shape from numbers and free sizes, or their texts, as a manifest holds it."""
    return tuple(Size.parse(size) if isinstance(size, str) else size for size in sizes)


BATCH, SEQUENCE = Size(("batch",)), Size(("sequence",))

PAST = Size(("past",))
"""Frames that a stream has seen: the free size of all its states that grow, such as keys and values."""

DTYPES = ("float32", "float16", "int64", "int32", "bool")
"""What tensors may hold."""

Position = Literal["every", "last", "whole"]
"""Whether an output has a value for every frame, is that of the last one, or one of the whole input."""

POSITIONS: tuple[str, ...] = get_args(Position)


Kind = Literal["normal", "ids", "integers", "mask"]

KINDS: tuple[str, ...] = get_args(Kind)
"""Of values, see Values."""


@dataclasses.dataclass(frozen=True)
class Values:
    """What an input may hold, from which examples and test data are drawn.

    Attributes:
        kind: `normal`, standard normal numbers; `ids`, from 0 and below a limit, such as a vocabulary's, and no others;
            `integers`, any, drawn from 0 and below a number; `mask`, along the last axis ones and then zeros, at
            least one of the former.
        below: of ids and integers, that number.
    """

    kind: Kind = "normal"
    below: int | None = None


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor by name, type and shape, such as state_sequence float32 [batch, sequence, 287]."""

    name: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of its free sizes, each once."""
        free = (size for size in self.shape if isinstance(size, Size))
        return tuple(dict.fromkeys(symbol for size in free for symbol in size.symbols))

    def framed(self, frames: int | Size, batch: int | Size | None = None) -> Self:
        """What is so of one frame, of several: with an axis of frames after that of the batch, which may be given."""
        first = self.shape[:1] if batch is None else (batch,)
        return dataclasses.replace(self, shape=(*first, frames, *self.shape[1:]))

    @property
    def width(self) -> int:
        """The last size, of those that end with a fixed one."""
        width = self.shape[-1]
        assert isinstance(width, int), f"{self} has no width"
        return width

    def at(self, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
        """Its shape where symbols stand for these numbers."""
        return tuple(size if isinstance(size, int) else size.at(sizes) for size in self.shape)


@dataclasses.dataclass(frozen=True)
class InputSpec(TensorSpec):
    """What a graph takes."""

    values: Values = Values()


@dataclasses.dataclass(frozen=True)
class OutputSpec(TensorSpec):
    """What a graph gives."""

    position: Position = "whole"


_COUNTED = 16
"""Frames that examples of a state have counted, at most."""


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """One tensor that a stream carries from frame to frame: `<layer>.<kind>`, such as 0.ssm.

    Attributes:
        shape: the batch and, for each entry, sizes; where one is PAST, it grows by one with every frame, from 0.
        initial: what fills it before the first frame: a number, or the file of the bundle (an ONNX TensorProto) that
            holds it for one entry, with a first axis of 1.
    """

    name: str
    dtype: str
    shape: Shape
    initial: float | str

    @property
    def grows(self) -> bool:
        """Whether it is longer after every frame."""
        return PAST in self.shape

    def of(self, batch: int, past: int = 0) -> tuple[int, ...]:
        """Its shape for so many streams side by side, after so many frames."""
        return tuple(size if isinstance(size, int) else past if size == PAST else batch for size in self.shape)

    @property
    def past(self) -> InputSpec:
        """The graph's input."""
        values = Values() if self.dtype.startswith("float") else Values("integers", _COUNTED)
        return InputSpec(f"past.{self.name}", self.dtype, self.shape, values)

    def present(self, frames: Size | None = None) -> OutputSpec:
        """The graph's output, after one frame or so many more."""
        longer = Size(PAST.symbols, 1) if frames is None else Size(tuple(sorted((*PAST.symbols, *frames.symbols))))
        shape = tuple(longer if size == PAST else size for size in self.shape)
        return OutputSpec(f"present.{self.name}", self.dtype, shape)
