"""Options of an architecture: a frozen dataclass whose fields carry their range and meaning."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

__all__ = [
    "MAX_WINDOW",
    "NUMERICS",
    "Config",
    "Numerics",
    "OptionError",
    "Shapes",
    "check_numerics",
    "checked",
    "describe_range",
    "option",
    "size_of",
]

Numerics = Literal["standard", "edifice"]
"""`standard` is the mathematics; `edifice` reproduces the Elixir library to rounding, its quirks included."""

NUMERICS: tuple[str, ...] = get_args(Numerics)

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter of a model, by its name."""

MAX_WINDOW = 8192
"""Frames of the longest window: attention compares each with each."""


class OptionError(ValueError):
    """An option of an architecture that is unknown, of the wrong type, or out of range."""


def check_numerics(numerics: str) -> None:
    """Raises OptionError unless `numerics` is one of NUMERICS."""
    if numerics not in NUMERICS:
        raise OptionError(f"numerics must be {' or '.join(NUMERICS)}, got {numerics!r}")


def option(
    default: Any,
    *,
    minimum: float = 0,
    below: float = math.inf,
    maximum: float = math.inf,
    untold: bool = False,
    help: str,
) -> Any:
    """A dataclass field with its range: minimum <= value <= maximum, and value < below.

    An option is `untold` if it changes the output and no parameter's shape tells its value.
    """
    return dataclasses.field(
        default=default,
        metadata={"minimum": minimum, "maximum": maximum, "below": below, "untold": untold, "help": help},
    )


def size_of(shapes: Shapes, name: str, axis: int) -> int | None:
    """The size of one axis of a parameter; None if there is no such parameter or axis."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def describe_range(field: dataclasses.Field[Any]) -> str:
    """The range of an option in words, such as `1 to 512`."""
    if isinstance(field.default, bool):
        return "true or false"
    low = field.metadata["minimum"]
    if field.metadata["below"] < math.inf:
        return f"{low} to below {field.metadata['below']}"
    return f"{low} to {field.metadata['maximum']}"


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of an option as its field has it: an integer of numpy's is one, and so is one a number.

    Raises:
        OptionError: it has the wrong type or lies outside its range.
    """
    kind = type(field.default)
    if kind is int and not isinstance(value, bool) and hasattr(value, "__index__"):
        with contextlib.suppress(TypeError):  # of what has it and is none, such as an array of several
            value = operator.index(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise OptionError(f"{field.name} must be {_ARTICLE[kind]}, got {value!r:.80}")
    low, high, below = (field.metadata[key] for key in ("minimum", "maximum", "below"))
    if not (low <= value <= high and value < below):
        raise OptionError(f"{field.name} must be {describe_range(field)}, got {value}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(abc.ABC):
    """Base of every architecture's options. Constructing one checks each value against its field's type and range.

    Raises:
        OptionError: a value has the wrong type or lies outside its range; the message names the option, the range
            and what was found.
    """

    window_binds: ClassVar[bool] = False
    """Whether the model is made for its window alone, so that a longer sequence can't be computed."""

    stream_ends_with_window: ClassVar[bool] = False
    """Whether a stream, which has no end, sees single frames of its window only: the window changes its output."""

    embed_dim: int = option(287, minimum=1, maximum=65_536, help="width of one input frame")
    hidden_size: int = option(256, minimum=1, maximum=16_384, help="width of the residual stream and of the output")
    num_layers: int = option(4, minimum=1, maximum=512, help="number of blocks")
    dropout: float = option(0.0, minimum=0, below=1, help="dropout rate in training; inference has none")
    window_size: int = option(60, minimum=1, maximum=MAX_WINDOW, help="frames in one window")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.hidden_size

    @property
    @abc.abstractmethod
    def param_count(self) -> int:
        """Number of parameters, by the formula that the architecture's Edifice module documents, if it has one."""

    @classmethod
    @abc.abstractmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """The options that the architecture's Edifice module recommends; they may differ from the build defaults."""

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """The options that a model must have been made with for its parameters to have these shapes.

        Args:
            shapes: of its parameters, by their torch names.
            given: options that are known otherwise, of which others may follow.

        Returns:
            The value of each option that shapes tell; None for one that they should and don't, for want of a
            parameter. That the shapes agree with each other is for loading them to find out.
        """
        blocks = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.([0-9]{1,6})\.", name))]
        hidden_size = size_of(shapes, "final_norm.weight", 0)
        return {
            "embed_dim": size_of(shapes, "input_projection.weight", 1) or hidden_size,
            "hidden_size": hidden_size,
            "num_layers": max(blocks) + 1 if blocks else None,
        }

    def options(self) -> dict[str, Any]:
        """Every option by name, as plain JSON values."""
        return dataclasses.asdict(self)


_ARTICLE: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false"}
