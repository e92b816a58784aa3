"""Rounding: float32's own error, where a graph is further from float64 than the tolerance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .overflow import overflows
from .reference import Outputs, Reference
from .report import ROUNDING_FACTOR, Case, Given, Trial

__all__ = ["Rounding", "float32_error", "with_rounding"]

SAMPLES, MOST_SAMPLES = 64, 256
"""Random roundings that the largest error is taken of; the most of them, where that is near what would do."""

_HALF_UNIT = 2.0**-24
"""What rounding to float32 changes a number by at most, relative to it."""


def with_rounding(failed: Sequence[Trial], reference: Reference) -> list[Trial]:
    """The cases with float32's own error: the largest that a float32 computation of the reference makes there.

    Of torch's float32 model as it is, and of samples of what others make that are as right: the same with every number
    that an operation reads changed at random by up to half a unit of float32's rounding. Where two computations are
    compared with each other, it is the largest difference between any two of them. No float32 graph computes better
    what products of sums that cancel amplify, as in H3 with large steps, or a norm of two channels nearly alike.

    Args:
        failed: cases beyond their limit.
        reference: what they were compared with.
    """
    result: list[Trial] = []
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in failed:
        # No rounding makes a number infinite, or a difference of what must be bitwise the same.
        if math.isfinite(trial[0].max_abs) and trial[0].limit > 0:
            groups.setdefault(_alike(*trial), []).append(trial)
        else:
            result.append(trial)
    for group in groups.values():
        case, given = max(group, key=lambda trial: trial[0].length)
        # Overflow is no rounding, though torch's own is as wrong.
        result += group if overflows(reference, case.graph, given) else _judged(reference, group)
    return result


def float32_error(reference: Reference, trial: Trial) -> float:
    """The error of torch's float32 model on a case, as it is."""
    case, given = trial
    errors = reference.float32(case.graph, given).errors()
    found = _Extremes(errors)
    return max(found.own_error(name, given) for name in given.outputs or errors)


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every float32 number that an operation reads is changed at random, as if it had been rounded anew."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operation; one that only moves numbers gets them as they are."""
        if not (func.is_view or func._schema.is_mutable or func.overloadpacket.__name__ in _MOVES):
            args = pytree.tree_map_only(Tensor, self._changed, args)
        return func(*args, **(kwargs or {}))

    def _changed(self, value: Tensor) -> Tensor:
        if value.dtype != torch.float32:
            return value
        return value * (1 + _HALF_UNIT * (2 * torch.rand(value.shape, generator=self._generator) - 1))


_MOVES = ("cat", "clone", "constant_pad_nd", "flip", "index", "index_select", "repeat", "stack", "where", "_to_copy")


def _alike(case: Case, given: Given) -> tuple[Any, ...]:
    """What is the same for cases of which the longest tells of the others too: those of one stream."""
    if case.graph == "window" or given.state is not None or given.whole:
        return (case.graph, case.source, case.batch, case.seed, case.magnitude, case.length, case.sizes)
    return ("stream", case.batch, case.seed, case.magnitude, given.restart)


class _Extremes:
    """The least and the largest error of each output, of all samples so far."""

    def __init__(self, errors: Outputs) -> None:
        self._low = {name: value.amin(0) for name, value in errors.items()}
        self._high = {name: value.amax(0) for name, value in errors.items()}

    def add(self, errors: Outputs) -> None:
        for name, value in errors.items():
            self._low[name] = torch.minimum(self._low[name], value.amin(0))
            self._high[name] = torch.maximum(self._high[name], value.amax(0))

    def own_error(self, name: str, given: Given, between: bool = False) -> float:
        """The largest error of an output where it was compared, or the largest difference between two."""
        low, high = self._low[name], self._high[name]
        if not given.whole and not name.startswith("present."):
            last = min(given.frames.shape[1], low.shape[1]) - 1
            low, high = low[:, last], high[:, last]
        return float((high - low if between else torch.maximum(high, -low)).max())


def _judged(reference: Reference, group: Sequence[Trial]) -> list[Trial]:
    """Samples until all cases are within what float32 does, or it is clear that they are not."""
    case, given = max(group, key=lambda trial: trial[0].length)
    float32 = reference.float32(case.graph, given)
    found, count = _Extremes(float32.errors()), 0
    while True:
        judged = [_with_own_error(trial, found) for trial in group]
        near = [case for case, _ in judged if not case.passed]
        if count >= SAMPLES:
            near = [case for case in near if case.max_abs <= ROUNDING_FACTOR * case.allowed]
        if not near or count >= MOST_SAMPLES:
            return judged
        errors = float32.errors(Rounding(count))
        found.add(errors)
        count += len(next(iter(errors.values())))


def _with_own_error(trial: Trial, found: _Extremes) -> Trial:
    case, given = trial
    cases = [
        each
        if each.max_abs <= each.limit
        else dataclasses.replace(each, rounding=found.own_error(name, given, each.compares_graphs))
        for name, each in (given.outputs or {"output": case}).items()
    ]
    return max(cases, key=lambda each: each.severity), given
