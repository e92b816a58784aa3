"""Verify: ONNX Runtime against the float64 reference, at every prefix length, in several batches and magnitudes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle, open_bundle
from .defaults import TOLERANCE
from .errors import RequestError
from .report import Case, Report, compare
from .runtime.model import Model, load
from .runtime.providers import all_providers, why_not_usable
from .stream_parity import Trial, count_stream, run_stream
from .torch_import import SMALL, small_model_threads, why_no_torch

__all__ = ["Progress", "prefix_lengths", "recurrence_gap", "verify"]

BATCHES = (1, 2, 5)
MAGNITUDES = (1e-20, 1e-3, 1e3, 1e6)
EVERY_PREFIX = 256
"""Windows up to this size are verified at every prefix length; of longer ones, at a sample unless asked for all."""

_MAX_SCORES = 2**28
"""Attention holds batch * heads * length^2 scores: beyond the window, and in batches, cases with more are left out."""

_MAX_AMPLIFIED = 0.25
"""Share of the cases that may be beyond the limit for rounding; weights with more of them need more than float32."""

_ROUNDINGS = 16

Progress = Callable[[int, int], None]
"""Called with the number of cases done and of all."""


def verify(
    bundle: str | Path | Bundle,
    providers: Sequence[str] | None = None,
    tolerance: float | None = None,
    every_prefix: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compares a bundle's graph, run by ONNX Runtime, with the float64 reference made of the bundle's own weights.

    Where torch can't be imported, it is compared with the bundle's test data only, and the report says so. Models of up
    to SMALL parameters are run with one thread.

    Args:
        bundle: its folder.
        providers: short names, each verified on its own; every usable one if None.
        tolerance: largest error allowed; the one that the bundle was made with if None.
        every_prefix: run every prefix length even of a window above EVERY_PREFIX frames.
        progress: called after each case, of those run side by side with others at the end.

    Raises:
        RequestError: not a bundle, a provider that is not usable, a tolerance that is not positive.
        CheckError: the bundle is damaged.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    with small_model_threads(opened.manifest.param_count):
        return _verify(opened, providers, tolerance, every_prefix, progress)


def _verify(
    opened: Bundle,
    providers: Sequence[str] | None,
    tolerance: float | None,
    every_prefix: bool,
    progress: Progress | None,
) -> Report:
    manifest = opened.manifest
    limit = float(manifest.parity.get("tolerance", TOLERANCE)) if tolerance is None else tolerance
    if not 0 < limit < math.inf:
        raise RequestError(f"tolerance must be positive, got {tolerance}")
    if providers is not None:
        providers = list(dict.fromkeys(providers))
    else:
        providers = [short for short in all_providers() if why_not_usable(short) is None]
    # As many as torch's, see small_model_threads: two halves are run side by side.
    threads = 1 if manifest.param_count <= SMALL else None
    models = [load(opened, [provider], threads) for provider in providers]

    reference = _load_reference(opened)
    named = dict(zip(providers, models, strict=True))
    total, trials = _plan(opened, named, reference, every_prefix, limit)
    cases: list[Case] = []
    failed: list[Trial] = []
    with contextlib.closing(trials):
        for case, sequence in trials:
            cases.append(case)
            if not case.passed:
                failed.append((case, sequence))
            if progress is not None:
                progress(len(cases), total)
    if reference is not None and len(failed) <= len(cases) * _MAX_AMPLIFIED:
        failed = _with_rounding(failed, opened)
    judged = [case for case in cases if case.passed] + [case for case, _ in failed]
    cases = sorted(judged, key=lambda case: -case.severity)
    compared = [case for case in cases if case.source == "reference"]
    report = Report(
        bundle=str(opened.path),
        reference="float64 reference" if reference else "test data",
        tolerance=limit,
        providers=list(providers),
        window=manifest.window_size,
        prefixes=len({case.length for case in compared if case.length <= manifest.window_size}),
        frames=len({case.length for case in compared if case.graph == "stream" and case.batch == 1}),
        cases=cases,
        recurrence_gap=recurrence_gap(reference, manifest.window_size) if reference else None,
    )
    if report.passed or reference is None:
        return report
    # One that failed against the reference, if there is one: of graphs that differ it is not known which is wrong, and
    # of test data from a state not what led there.
    case, sequence = max(
        failed, key=lambda pair: (pair[0].source == "reference", pair[0].runs_from_the_start, pair[0].severity)
    )
    return _diagnose(report, opened, reference, case, sequence)


def _plan(
    bundle: Bundle, models: Mapping[str, Model], reference: Any, every_prefix: bool, tolerance: float
) -> tuple[int, Generator[Trial, None, None]]:
    """How many comparisons there are, and the comparisons."""
    graphs, total, parts = bundle.manifest.graphs, 0, []
    if "window" in graphs:
        heads = getattr(reference.config, "num_heads", 1) if reference else 1
        limited = graphs["window"].max_sequence is not None
        sweeps = list(_sweeps(bundle.manifest.window_size, heads, every_prefix, limited)) if reference else []
        total += len(graphs["window"].test_data) + sum(len(sweep.lengths) for sweep in sweeps)
        parts.append(_run(bundle, models, reference, sweeps, tolerance))
    if "stream" in graphs:
        total += count_stream(bundle, every_prefix, reference is not None)
        # First, as they are the most: progress is that of the first.
        parts.insert(0, run_stream(bundle, models, reference, every_prefix, tolerance))
    # Others than the CPU may not bear two runs at once.
    alone = set(models) != {"cpu"}
    return total * len(models), (trial for part in parts for trial in part) if alone else _side_by_side(parts)


def _side_by_side(parts: Sequence[Iterator[Trial]]) -> Generator[Trial, None, None]:
    """All of the first part, then of the next, made meanwhile: both runtimes leave the interpreter to other threads."""
    stop = threading.Event()

    def collect(part: Iterator[Trial]) -> list[Trial]:
        return list(itertools.takewhile(lambda _: not stop.is_set(), part))

    with ThreadPoolExecutor(max(len(parts) - 1, 1)) as pool:
        later = [pool.submit(collect, part) for part in parts[1:]]
        try:
            yield from parts[0]
            for part in later:
                yield from part.result()
        finally:
            stop.set()


def prefix_lengths(window: int) -> list[int]:
    """The prefix lengths of a window to verify unless all are asked for.

    All of a window up to EVERY_PREFIX; else those up to half of that, the last 16, and 48 evenly between.
    """
    if window <= EVERY_PREFIX:
        return list(range(1, window + 1))
    start, last = EVERY_PREFIX // 2, window - 16
    between = (start + (last - start) * step // 48 for step in range(1, 48))
    return sorted({*range(1, start + 1), *between, *range(last + 1, window + 1)})


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """One random input and the prefixes of it to run."""

    batch: int
    seed: int
    magnitude: float
    lengths: list[int]


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


def _run(
    bundle: Bundle, models: Mapping[str, Model], reference: Any, sweeps: Sequence[_Sweep], tolerance: float
) -> Iterator[Trial]:
    """Every case of a plan, and what was fed."""
    for folder, inputs, outputs in bundle.test_data("window"):
        for provider, model in models.items():
            sequence, expected = inputs[model.input.name], outputs[model.output.name].astype(np.float64)
            given = _Sweep(sequence.shape[0], 0, 1.0, [sequence.shape[1]])
            yield _judge(model(sequence), expected, tolerance, provider, folder, sequence.shape[1], given), sequence
    width = int(bundle.manifest.graphs["window"].inputs[0].shape[-1])
    for sweep in sweeps:
        generator = np.random.default_rng(sweep.seed)
        whole = generator.standard_normal((sweep.batch, max(sweep.lengths), width)) * sweep.magnitude
        whole = whole.astype(np.float32)
        outputs_of = _reference_prefixes(reference, whole)
        for provider, model in models.items():
            for length in sweep.lengths:
                sequence = whole[:, :length]
                expected = outputs_of[:, length - 1]
                yield _judge(model(sequence), expected, tolerance, provider, "reference", length, sweep), sequence


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


def _load_reference(bundle: Bundle) -> Any:
    """The float64 reference model of a bundle's weights, or None where torch can't be imported."""
    if why_no_torch() is not None:
        return None
    from .reference_model import reference_of

    return reference_of(bundle).double()


def _reference_prefixes(reference: Any, sequence: np.ndarray) -> np.ndarray:
    """The reference's output at every prefix, float64 [batch, sequence, hidden]."""
    import torch

    # Of long sequences one entry at a time, for memory.
    size = len(sequence) if sequence.shape[1] <= EVERY_PREFIX else 1
    entries = torch.tensor(sequence, dtype=torch.float64)
    with torch.no_grad():
        parts = [reference.forward_prefixes(entries[i : i + size]) for i in range(0, len(entries), size)]
        result: np.ndarray = torch.cat(parts).numpy()
    return result


def _with_rounding(failed: Sequence[Trial], bundle: Bundle) -> list[Trial]:
    """The cases with what rounding does to torch's own float32 model near their input and its parameters.

    Products of sums that cancel, as in H3 with large steps, amplify rounding for a few inputs: no float32 graph is near
    float64 there, and a right one is as near as torch.
    """
    if not failed:
        return []
    from .reference_model import reference_of

    model, known = reference_of(bundle), {}
    result = []
    for case, sequence in sorted(failed, key=lambda pair: -pair[0].length):
        if math.isfinite(case.max_abs) and case.runs_from_the_start:
            # Of a stream, the longest case of a sequence tells of the others too.
            alone = (case.source, case.length) if case.graph == "window" else ()
            shared = (case.batch, case.seed, case.magnitude, *alone)
            if shared not in known:
                known[shared] = _rounding(model, case, sequence)
            case = dataclasses.replace(case, rounding=float(known[shared][: case.length][-1]))
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
            found = _outputs(other, case.graph, near).double()
            error = (found - _outputs(other.double(), case.graph, near.double())).abs().amax(dim=(0, 2))
            largest = torch.maximum(largest, error)
    result: np.ndarray = largest.numpy()
    return result


def _outputs(model: Any, graph: str, sequence: Any) -> Any:
    """What a graph should give: at every frame of a stream [B, T, D], at the last of a window [B, 1, D]."""
    return model(sequence)[:, None] if graph == "window" else model.forward_stream(sequence)


def recurrence_gap(reference: Any, window: int) -> float | None:
    """The largest difference that an exact recurrence would make within a window; None if the reference's is exact."""
    exact = reference.with_exact_recurrence()
    if exact is None:
        return None
    sequence = np.random.default_rng(0).standard_normal((1, window, reference.config.embed_dim)).astype(np.float32)
    return float(np.abs(_reference_prefixes(reference, sequence) - _reference_prefixes(exact, sequence)).max())


def _diagnose(report: Report, bundle: Bundle, reference: Any, case: Case, sequence: np.ndarray) -> Report:
    """Adds to a failed report where the graph departs, and whether torch's own float32 does as well."""
    import torch

    from .locate import first_departure
    from .reference_model import reference_of

    # A stream that goes wrong after a history may have been given a wrong state.
    graphs = ["prefill", "stream"] if case.source == "after prefill" else [case.graph]
    found = (first_departure(bundle, reference, sequence, graph, case.provider, report.tolerance) for graph in graphs)
    departure = next((departure for departure in found if departure is not None), None)
    with torch.no_grad():
        expected = _outputs(reference, case.graph, torch.tensor(sequence).double())[:, -1]
        rounded = _outputs(reference_of(bundle), case.graph, torch.tensor(sequence))[:, -1].double()
    error = float((rounded - expected).abs().max())
    return dataclasses.replace(report, departure=departure, float32_error=error)
