"""Rounding: what it does to torch's own float32 model, where a graph is further from float64 than the tolerance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Bundle
from .overflow import overflows
from .report import Case, Trial

__all__ = ["outputs_of", "with_rounding"]

_ROUNDINGS = 16
"""Random changes by rounding that the largest error is taken of."""


def with_rounding(failed: Sequence[Trial], bundle: Bundle) -> list[Trial]:
    """The cases with what rounding does to torch's own float32 model near their input and its parameters.

    Products of sums that cancel, as in H3 with large steps, amplify rounding for a few inputs: no float32 graph is near
    float64 there, and a right one is as near as torch. Overflow is no rounding, though torch's own is as wrong.
    """
    if not failed:
        return []
    from .reference_model import reference_of

    model = reference_of(bundle)
    known: dict[tuple[Any, ...], np.ndarray | None] = {}
    result = []
    for case, sequence in sorted(failed, key=lambda pair: -pair[0].length):
        if math.isfinite(case.max_abs) and case.runs_from_the_start:
            # Of a stream, the longest case of a sequence tells of the others too.
            alone = (case.source, case.length) if case.graph == "window" else ()
            shared = (case.batch, case.seed, case.magnitude, *alone)
            if shared not in known:
                known[shared] = None if overflows(model, case.graph, sequence) else _rounding(model, case, sequence)
            if (rounding := known[shared]) is not None:
                case = dataclasses.replace(case, rounding=float(rounding[: case.length][-1]))
        result.append((case, sequence))
    return result


def _rounding(model: Any, case: Case, sequence: np.ndarray) -> np.ndarray:
    """Of a stream, at every frame [sequence]; of a window, of its one output [1]."""
    import copy

    import torch

    generator = torch.Generator().manual_seed(case.seed)
    eps = torch.finfo(torch.float32).eps

    def nearby(value: torch.Tensor) -> torch.Tensor:
        return value * (1 + eps * (2 * torch.rand(value.shape, generator=generator) - 1))

    largest: Any = torch.zeros(1)
    for _ in range(_ROUNDINGS):
        # Parameters too: of a tiny input nothing may be left after the first bias.
        other, near = copy.deepcopy(model), nearby(torch.tensor(sequence))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(nearby(parameter))
            found = outputs_of(other, case.graph, near).double()
            error = (found - outputs_of(other.double(), case.graph, near.double())).abs().amax(dim=(0, 2))
            largest = torch.maximum(largest, error)
    result: np.ndarray = largest.numpy()
    return result


def outputs_of(model: Any, graph: str, sequence: Any) -> Any:
    """What a graph should give: at every frame of a stream [B, T, D], at the last of a window [B, 1, D]."""
    return model(sequence)[:, None] if graph == "window" else model.forward_stream(sequence)
