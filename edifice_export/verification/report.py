"""What verify finds: the error of every case, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..defaults import TOLERANCE
from ..errors import NotFiniteError
from ..values import Arrays

if TYPE_CHECKING:
    from .locate import Departure

__all__ = [
    "LEAST",
    "ROUNDING_FACTOR",
    "Case",
    "Given",
    "Report",
    "Trial",
    "attempt",
    "compare",
    "describe_amplified",
    "describe_gap",
    "describe_stream",
    "describe_tolerance",
]

LEAST = 1e-30
"""Outputs of a module may be of any size: the tolerance is relative to the largest, but not of nothing."""

ROUNDING_FACTOR = 2
"""How much further than float32's own error a graph may be from float64, on inputs that amplify rounding."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: what was run and how far the result is from the reference.

    Attributes:
        graph: the graph that was run, see manifest.GRAPHS.
        source: what it was compared with: `reference` (the float64 model), the folder of a test data set, or of a
            stream, what it must be equal to: `window graph`, `after prefill`, `permuted batch`, `reset entry`, and,
            bitwise, `snapshot`.
        batch, length: entries, and frames up to the output that was compared; 0 of a module's window graph, see sizes.
        max_abs: largest absolute error; infinite where one side is finite and the other is not.
        max_rel: max_abs relative to the largest reference output.
        limit: the largest max_abs allowed, but for rounding that float32 itself can't do without.
        sizes: of a module's window graph, all free sizes by symbol, as text.
        rounding: of a case beyond its limit, float32's own error, see rounding.with_rounding; None where it was not
            needed.
    """

    graph: str
    provider: str
    source: str
    batch: int
    length: int
    seed: int
    magnitude: float
    max_abs: float
    max_rel: float
    limit: float
    sizes: str = ""
    rounding: float | None = None

    @property
    def allowed(self) -> float:
        """The limit, or ROUNDING_FACTOR times float32's own error if that is more."""
        return max(self.limit, ROUNDING_FACTOR * (self.rounding or 0.0))

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.max_abs <= self.allowed

    @property
    def compares_graphs(self) -> bool:
        """Whether it is compared with what a graph gave too, and not with the reference."""
        return self.source in ("window graph", "permuted batch", "snapshot")

    @property
    def severity(self) -> float:
        """The error in units of what is allowed."""
        if self.allowed == 0:
            return math.inf if self.max_abs else 0.0
        return self.max_abs / self.allowed

    def __str__(self) -> str:
        inputs = f"seed {self.seed}, magnitude {self.magnitude:g}" if self.source == "reference" else self.source
        return f"{self.graph} on {self.provider}, {self.at}, {inputs}"

    @property
    def at(self) -> str:
        """The sizes that were run."""
        return self.sizes or f"batch {self.batch}, length {self.length}"


@dataclasses.dataclass(frozen=True)
class Given:
    """What led to the numbers that a case compares.

    Attributes:
        inputs: by name; of frames, such as float32 [batch, sequence, embed_dim], up to the last that was compared.
        state: of test data, what a stream was given before them, by name; None if it starts there.
        restart: frames after which entry 0 was started anew; 0 if it never was.
        whole: whether the outputs at all frames were compared, and not only the last.
        outputs: of test data with a state, the case of every output by its name; the trial's is the worst of them.
    """

    inputs: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray] | None = None
    restart: int = 0
    whole: bool = False
    outputs: Mapping[str, Case] = dataclasses.field(default_factory=dict)

    @property
    def frames(self) -> np.ndarray:
        """The first input, which is all that an architecture takes."""
        return next(iter(self.inputs.values()))


Trial = tuple[Case, Given]
"""A comparison, and what led to it."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What verify found.

    Attributes:
        reference: what was compared with: `float64 reference`, or `test data` where torch can't be imported.
        window: frames in one window.
        prefixes: how many of the prefix lengths 1 to window the window graph was run at; 0 without one.
        frames: how many frames the stream graph was followed for, one by one; 0 without one.
        histories: how many lengths of history the prefill graph was given from the start; 0 without one.
        sizes: of a module, at how many different sizes its window graph was run; 0 of others.
        cases: every comparison, the worst first (by error over what is allowed).
        departure: where it failed, the first node whose value departs from the reference.
        float32_error: where it failed, the error of torch itself in float32 on the worst case.
        why_test_data: of a comparison with test data alone, why; None of others.
        loosened: what is to be said first: of a tolerance above defaults.TOLERANCE, which it is and where it is from.
        recurrence_gap: of a reference that keeps Edifice's inexact recurrence, the largest difference that the exact
            one would make to the output of any prefix of a window, on these weights and a random input.
    """

    bundle: str
    reference: str
    tolerance: float
    providers: list[str]
    window: int
    prefixes: int
    frames: int
    histories: int
    sizes: int
    cases: list[Case]
    departure: Departure | None = None
    float32_error: float | None = None
    recurrence_gap: float | None = None
    loosened: str | None = None
    why_test_data: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every case is within its limit."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def worst(self) -> Case:
        """The case with the largest error over what it is allowed."""
        return self.cases[0]

    @property
    def max_abs(self) -> float:
        """The largest absolute error of all cases."""
        return max(case.max_abs for case in self.cases)

    @property
    def max_rel(self) -> float:
        """The largest error of all cases relative to the case's largest output."""
        return max(case.max_rel for case in self.cases)

    @property
    def amplified(self) -> int:
        """How many cases passed beyond their limit, because they are within what float32's own error allows."""
        return sum(case.passed and case.max_abs > case.limit for case in self.cases)

    def summary(self) -> str:
        """The result in one line."""
        agree = sum(case.passed for case in self.cases)
        line = (
            f"{agree} of {len(self.cases)} cases agree with the {self.reference}; largest error {self.max_abs:.1e} "
            f"absolute, {self.max_rel:.1e} relative; worst case, with {self.worst.max_abs:.1e} of "
            f"{self.worst.allowed:.1e} allowed: {self.worst}"
        )
        if self.amplified:
            line += f"; {describe_amplified(self.amplified)}"
        if self.departure is not None:
            line += f"; the first node that departs is {self.departure}"
        if self.float32_error is not None and not self.float32_error <= max(self.worst.limit, self.tolerance):
            line += (
                f"; torch in float32 departs by {self.float32_error:.1e} as well: these weights need "
                "more than float32, or a larger --tolerance"
            )
        elif not self.passed and self.departure is not None:
            line += "; if the graph was not changed, this is a defect of edifice-export, or a case for --tolerance"
        return line

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an error that is not finite becomes null."""
        plain: dict[str, Any] = _without_infinities(dataclasses.asdict(self))
        for case, described in zip(self.cases, plain["cases"], strict=True):
            described["passed"] = case.passed
        return {
            "loosened": plain.pop("loosened"),
            "passed": self.passed,
            "amplified": self.amplified,
            **_without_infinities({"max_abs": self.max_abs, "max_rel": self.max_rel}),
            **plain,
        }


def attempt(run: Callable[..., Any], inputs: Sequence[np.ndarray], expected: Arrays) -> Arrays:
    """What a model gives, by name; NaN of the expected shapes where it hands out nothing, as it is not finite."""
    try:
        found = run(*(np.asarray(array, order="C") for array in inputs))
    except NotFiniteError:
        return {name: np.full(value.shape, np.nan, np.float32) for name, value in expected.items()}
    return dict(zip(expected, found if isinstance(found, tuple) else (found,), strict=True))


def compare(found: np.ndarray, expected: np.ndarray, tolerance: float, floor: float = 1.0, **described: Any) -> Case:
    """One comparison.

    Args:
        found: what a graph gave.
        expected: what it should have given.
        tolerance: see defaults.TOLERANCE.
        floor: the least output that the tolerance is relative to: 1 of architectures, whose outputs are normalised.
        **described: the other fields of a case.
    """
    if found.dtype.kind in "biu":
        found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    # Where the reference is not finite, the graph must be the same: a NaN, or an infinity of that sign.
    alike = found.shape == expected.shape and np.array_equal(found[~finite], expected[~finite], equal_nan=True)
    alike = alike and bool(np.isfinite(found[finite]).all())
    error = float(np.abs(found[finite] - expected[finite]).max(initial=0.0)) if alike else math.inf
    return Case(
        max_abs=error,
        max_rel=error / largest if largest else error,
        limit=tolerance * max(floor, largest),
        **described,
    )


def describe_amplified(count: int) -> str:
    """What a number of amplified cases means, in one line."""
    return f"{count} of the inputs amplify rounding beyond the limit, and the graph is within twice float32's own error"


def describe_stream(frames: int, histories: int) -> str:
    """What the stream and prefill graphs were run for, in one line."""
    from_histories = f", and from {histories} lengths of history" if histories else ""
    return f"followed as a stream, frame by frame, for {frames} frames{from_histories}"


def describe_gap(gap: float) -> str:
    """What a recurrence_gap means, in one line."""
    return (
        f"edifice numerics keep Edifice's inexact recurrence: on these weights the exact one, standard numerics, would "
        f"change the output by up to {gap:.1e} within the window"
    )


def describe_tolerance(tolerance: float, asked: bool = False) -> str | None:
    """What is to be said of a tolerance above the one that a build sets by itself; None of others.

    Args:
        tolerance: see defaults.TOLERANCE.
        asked: whether it was asked for just now; if not, it is the bundle's own.
    """
    if tolerance <= TOLERANCE:
        return None
    whose = "that was asked for" if asked else "in this bundle's manifest, set when it was built or by who edited it,"
    return (
        f"the tolerance {whose} is {tolerance:g}, above the {TOLERANCE:g} of edifice-export: agreement within it is "
        "no verification to that"
    )


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
