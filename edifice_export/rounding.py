"""Rounding: float32's own error, where a graph is further from float64 than the tolerance."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bundle import Bundle
from .freeze import freeze
from .overflow import overflows
from .reference_model import reference_of
from .report import ROUNDING_FACTOR, Case, Given, Trial

__all__ = ["float32_error", "outputs_of", "with_rounding"]

SAMPLES, MOST_SAMPLES = 64, 256
"""Random changes by rounding that the largest error is taken of; the most of them, where that is near what would do."""

_AT_ONCE = 16
_MAX_PAIRS = 2**20
"""Changes of the input that are computed at once with one of the parameters; the most pairs of frames, for memory."""

Outputs = dict[str, Tensor]


def with_rounding(failed: Sequence[Trial], bundle: Bundle) -> list[Trial]:
    """The cases with float32's own error: the largest that torch's float32 model makes there.

    Of the case itself, and of neighbours: the same with every number of its input, its state and the parameters changed
    at random by up to one unit of rounding. Where two float32 computations are compared, it is the largest difference
    between any two of these errors. What products of sums that cancel amplify, as in H3 with large steps, or a norm of
    two channels that are nearly alike, no float32 graph computes better; a right one is about as near as torch.

    Args:
        failed: cases beyond their limit.
        bundle: where they come from.
    """
    result: list[Trial] = []
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in failed:
        # No rounding makes a number infinite, or a difference of what must be bitwise the same.
        if math.isfinite(trial[0].max_abs) and trial[0].limit > 0:
            groups.setdefault(_alike(*trial), []).append(trial)
        else:
            result.append(trial)
    model = reference_of(bundle) if groups else None
    for group in groups.values():
        case, given = max(group, key=lambda trial: trial[0].length)
        # Overflow is no rounding, though torch's own is as wrong.
        result += group if overflows(model, case.graph, given.frames) else _judged(model, group)
    return result


def float32_error(model: nn.Module, trial: Trial) -> float:
    """The error of torch's float32 model on a case itself."""
    case, given = trial
    found = _Extremes(_errors(model, case.graph, given, *_nearby(given, 1, None)))
    return max(found.own_error(name, given) for name in given.outputs or ("output",))


def outputs_of(model: Any, graph: str, given: Given, frames: Tensor, state: Outputs | None) -> Outputs:
    """What a graph should give: `output` at every frame of a stream [B, T, D], at the last of a window [B, 1, D].

    Args:
        model: the reference, of the precision of frames and state.
        graph: one of manifest.GRAPHS.
        given: says where entries were restarted.
        frames: [B, T, E]. B may be a multiple of what was given.
        state: before the first of them; None at the start of a stream.
    """
    if graph == "window":
        return {"output": model(frames)[:, None]}
    if state is not None:
        output, after = model.extend(frames, state)
        return {"output": output, **{f"present.{name}": value for name, value in after.items()}}
    output = model.forward_stream(frames)
    if given.restart:
        firsts = slice(None, None, given.frames.shape[0])
        output = output.clone()
        output[firsts, given.restart :] = model.forward_stream(frames[firsts, given.restart :])
    return {"output": output}


def _alike(case: Case, given: Given) -> tuple[Any, ...]:
    """What is the same for cases of which the longest tells of the others too: those of one stream."""
    if case.graph == "window" or given.state is not None or given.whole:
        return (case.graph, case.source, case.batch, case.seed, case.magnitude, case.length)
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
        if name == "output" and not given.whole:
            last = min(given.frames.shape[1], low.shape[1]) - 1
            low, high = low[:, last], high[:, last]
        return float((high - low if between else torch.maximum(high, -low)).max())


def _judged(model: Any, group: Sequence[Trial]) -> list[Trial]:
    """Samples until all cases are within what float32 does, or it is clear that they are not."""
    case, given = max(group, key=lambda trial: trial[0].length)
    found, count = _Extremes(_errors(model, case.graph, given, *_nearby(given, 1, None))), 0
    while True:
        judged = [_with_own_error(trial, found) for trial in group]
        near = [case for case, _ in judged if not case.passed]
        if count >= SAMPLES:
            near = [case for case in near if case.max_abs <= ROUNDING_FACTOR * case.allowed]
        if not near or count >= MOST_SAMPLES:
            return judged
        errors = _neighbours(model, case, given, count)
        found.add(errors)
        count += len(errors["output"])


def _with_own_error(trial: Trial, found: _Extremes) -> Trial:
    case, given = trial
    cases = [
        each
        if each.max_abs <= each.limit
        else dataclasses.replace(each, rounding=found.own_error(name, given, each.compares_graphs))
        for name, each in (given.outputs or {"output": case}).items()
    ]
    return max(cases, key=lambda each: each.severity), given


def _neighbours(model: nn.Module, case: Case, given: Given, seed: int) -> Outputs:
    """Errors of torch's float32 model [K, B, T, ...] on K changes of what was given, and one of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = given.frames.shape[:2]
    count = max(1, min(_AT_ONCE, _MAX_PAIRS // (batch * length**2)))
    # Parameters too: of a tiny input nothing may be left after the first bias.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(_rounded(parameter, generator))
    return _errors(other, case.graph, given, *_nearby(given, count, generator))


def _nearby(given: Given, count: int, generator: torch.Generator | None) -> tuple[Tensor, Outputs | None]:
    """So many copies of what was given in one batch, each changed by rounding if there is a generator."""

    def several(array: Any) -> Tensor:
        value = torch.tensor(array).repeat(count, *[1] * (array.ndim - 1))
        return _rounded(value, generator) if generator is not None and value.is_floating_point() else value

    state = given.state
    return several(given.frames), state and {name: several(value) for name, value in state.items()}


def _rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    return value * (1 + torch.finfo(torch.float32).eps * (2 * torch.rand(value.shape, generator=generator) - 1))


def _errors(model: nn.Module, graph: str, given: Given, frames: Tensor, state: Outputs | None) -> Outputs:
    """Float32 less float64, of the same numbers. What depends on no input is rounded once in float32, as in a graph."""

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    with torch.no_grad():
        found = outputs_of(freeze(model), graph, given, frames, state)
        exact = copy.deepcopy(model).double()
        wanted = outputs_of(exact, graph, given, frames.double(), state and {k: double(v) for k, v in state.items()})
    shape = -1, given.frames.shape[0]
    # What is not finite excuses nothing.
    return {
        name: torch.nan_to_num(value.double() - wanted[name], 0, 0, 0).unflatten(0, shape)
        for name, value in found.items()
    }
