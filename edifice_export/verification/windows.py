"""Verification of windows: at every prefix length, in several batches and magnitudes, and beyond the window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.bundle import Bundle
from ..runtime.model import Model
from ..values import MAX_MAGNITUDE
from .report import Case, Given, Trial, attempt, compare

if TYPE_CHECKING:
    from edifice_reference.models.contract import ReferenceModel

    from .reference import Reference

__all__ = ["count_window", "prefix_lengths", "reference_prefixes", "run_window"]

BATCHES = (1, 2, 5)
MAGNITUDES = (1e-20, 1e-3, 1e3, MAX_MAGNITUDE)
EVERY_PREFIX = 256
"""Windows up to this size are verified at every prefix length; of longer ones, at a sample unless asked for all."""

_MAX_SCORES = 2**28
"""Attention holds batch * heads * length^2 scores: beyond the window, and in batches, cases with more are left out."""


def count_window(bundle: Bundle, reference: Reference | None, every_prefix: bool) -> int:
    """How many comparisons run_window makes for each provider."""
    sweeps = _sweeps_of(bundle, reference, every_prefix)
    return len(bundle.manifest.graphs["window"].test_data) + sum(len(sweep.lengths) for sweep in sweeps)


def run_window(
    bundle: Bundle, models: Mapping[str, Model], reference: Reference | None, every_prefix: bool, tolerance: float
) -> Iterator[Iterator[Trial]]:
    """Every comparison of the window graph, as jobs that only run ONNX Runtime: the reference comes before each.

    Args:
        bundle: with a window graph.
        models: by provider.
        reference: what it is held to, or None to compare with the test data only.
        every_prefix: run every prefix length even of a window above EVERY_PREFIX frames.
        tolerance: see defaults.TOLERANCE.
    """
    for provider, model in models.items():
        yield _run_test_data(bundle, model, provider, tolerance)
    width = bundle.manifest.graphs["window"].inputs[0].width
    for sweep in _sweeps_of(bundle, reference, every_prefix):
        generator = np.random.default_rng(sweep.seed)
        whole = generator.standard_normal((sweep.batch, max(sweep.lengths), width)) * sweep.magnitude
        whole = whole.clip(-MAX_MAGNITUDE, MAX_MAGNITUDE).astype(np.float32)
        expected = reference_prefixes(_model_of(reference), whole)[:, [length - 1 for length in sweep.lengths]]
        for provider, model in models.items():
            yield _run_sweep(model, provider, tolerance, sweep, whole, expected)


def _model_of(reference: Reference | None) -> ReferenceModel:
    from .reference import ArchitectureReference

    assert isinstance(reference, ArchitectureReference), "only architectures have sweeps, and with a reference"
    return reference.model


def _run_test_data(bundle: Bundle, model: Model, provider: str, tolerance: float) -> Iterator[Trial]:
    for folder, inputs, outputs in bundle.test_data("window"):
        sequence, expected = inputs[model.inputs[0].name], outputs[model.outputs[0].name].astype(np.float64)
        sweep = _Sweep(sequence.shape[0], 0, 1.0, [sequence.shape[1]])
        found = attempt(model, [sequence], {"output": expected})["output"]
        yield (
            _judge(found, expected, tolerance, provider, folder, sequence.shape[1], sweep),
            Given({model.inputs[0].name: sequence}),
        )


def _run_sweep(
    model: Model, provider: str, tolerance: float, sweep: _Sweep, whole: np.ndarray, expected: np.ndarray
) -> Iterator[Trial]:
    for index, length in enumerate(sweep.lengths):
        sequence, wanted = whole[:, :length], expected[:, index]
        found = attempt(model, [sequence], {"output": wanted})["output"]
        yield (
            _judge(found, wanted, tolerance, provider, "reference", length, sweep),
            Given({model.inputs[0].name: sequence}),
        )


def prefix_lengths(window: int) -> list[int]:
    """The prefix lengths of a window to verify unless all are asked for.

    All of a window up to EVERY_PREFIX; else those up to half of that, the last 16, and 48 evenly between.
    """
    if window <= EVERY_PREFIX:
        return list(range(1, window + 1))
    start, last = EVERY_PREFIX // 2, window - 16
    between = (start + (last - start) * step // 48 for step in range(1, 48))
    return sorted({*range(1, start + 1), *between, *range(last + 1, window + 1)})


def reference_prefixes(reference: ReferenceModel, sequence: np.ndarray) -> np.ndarray:
    """The reference's output at every prefix, float64 [batch, sequence, hidden]."""
    import torch

    # Of long sequences one entry at a time, for memory.
    size = len(sequence) if sequence.shape[1] <= EVERY_PREFIX else 1
    entries = torch.tensor(sequence, dtype=torch.float64)
    with torch.no_grad():
        parts = [reference.forward_prefixes(entries[i : i + size]) for i in range(0, len(entries), size)]
        result: np.ndarray = torch.cat(parts).numpy()
    return result


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """One random input and the prefixes of it to run."""

    batch: int
    seed: int
    magnitude: float
    lengths: list[int]


def _sweeps_of(bundle: Bundle, reference: Reference | None, every_prefix: bool) -> list[_Sweep]:
    if reference is None:
        return []
    limited = bundle.manifest.max_frames("window") is not None
    heads = bundle.manifest.program.options.get("num_heads", 1)
    return list(_sweeps(bundle.manifest.window_size, heads, every_prefix, limited))


def _sweeps(window: int, heads: int, every_prefix: bool, limited: bool) -> Iterator[_Sweep]:
    prefixes = list(range(1, window + 1)) if every_prefix else prefix_lengths(window)
    whole = len(prefixes) == window
    beyond = [] if limited else [2 * window, _next_prime(2 * window + 1)]
    for seed, batch in enumerate(BATCHES):
        # Of a sample of a long window, a single entry runs all and batches a quarter.
        lengths = prefixes if whole or batch == 1 else [*prefixes[::4], window]
        wanted = [length for length in (*lengths, *beyond) if batch * heads * length**2 <= _MAX_SCORES]
        yield _Sweep(batch, seed, 1.0, sorted({*wanted, window} if batch == 1 else wanted))
    for seed, magnitude in enumerate(MAGNITUDES, len(BATCHES)):
        yield _Sweep(1, seed, magnitude, sorted({1, min(2, window), (window + 1) // 2, window}))


def _next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def _judge(
    found: np.ndarray, expected: np.ndarray, tolerance: float, provider: str, source: str, length: int, sweep: _Sweep
) -> Case:
    return compare(
        found,
        expected,
        tolerance,
        graph="window",
        provider=provider,
        source=source,
        batch=sweep.batch,
        length=length,
        seed=sweep.seed,
        magnitude=sweep.magnitude,
    )
