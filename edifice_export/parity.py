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
from .report import Case, Report, Trial
from .runtime.model import Model, load
from .runtime.providers import all_providers, why_not_usable
from .stream_parity import count_stream, run_stream
from .torch_import import SMALL, small_model_threads, why_no_torch
from .window_parity import count_window, reference_prefixes, run_window

__all__ = ["Progress", "recurrence_gap", "verify"]

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
    if "stream" in graphs:
        # First, as they are the most: progress is that of the first.
        total += count_stream(bundle, every_prefix, reference is not None)
        parts.append(run_stream(bundle, models, reference, every_prefix, tolerance))
    if "window" in graphs:
        total += count_window(bundle, reference, every_prefix)
        parts.append(run_window(bundle, models, reference, every_prefix, tolerance))
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


def _load_reference(bundle: Bundle) -> Any:
    """The float64 reference model of a bundle's weights, or None where torch can't be imported."""
    if why_no_torch() is not None:
        return None
    from .reference_model import reference_of

    return reference_of(bundle).double()


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
    return float(np.abs(reference_prefixes(reference, sequence) - reference_prefixes(exact, sequence)).max())


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
