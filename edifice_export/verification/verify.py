"""Verify: ONNX Runtime against the float64 reference, at every prefix length, in several batches and magnitudes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle, open_bundle
from ..defaults import TOLERANCE
from ..errors import RequestError
from ..machine import SMALL, small_model_threads, why_no_torch
from ..runtime.model import load
from ..runtime.providers import all_providers, why_not_usable
from ..runtime.version import refuse_old_runtime
from .report import Report, Trial, describe_tolerance
from .side_by_side import Done, SideBySide
from .streams import count_stream, run_stream
from .windows import count_window, reference_prefixes, run_window

__all__ = ["PARTS", "Progress", "Verification", "recurrence_gap", "verify"]

PARTS = {"stream": (count_stream, run_stream), "window": (count_window, run_window)}
"""How many comparisons there are of a graph (of the stream with prefill) and their jobs; the longest come first."""

_MAX_AMPLIFIED = 0.25
"""Share of the cases that may be beyond the limit for rounding; weights with more of them need more than float32."""

Progress = Callable[[int, int], None]
"""Called with the number of cases done and of all."""


def verify(
    bundle: str | Path | Bundle,
    providers: Sequence[str] | None = None,
    tolerance: float | None = None,
    every_prefix: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compares a bundle's graphs, run by ONNX Runtime, with the float64 reference made of the bundle's own weights.

    Where torch can't be imported, they are compared with the bundle's test data only, and the report says so. Models of
    up to SMALL parameters are run with one thread.

    Args:
        bundle: its folder.
        providers: short names, each verified on its own; every usable one if None.
        tolerance: largest error allowed; the one that the bundle was made with if None.
        every_prefix: run every prefix length even of a window above EVERY_PREFIX frames.
        progress: called after each case.

    Raises:
        RequestError: not a bundle, a provider that is not usable, a tolerance that is not positive.
        CheckError: the bundle is damaged.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    refuse_old_runtime()  # which runs no provider
    manifest = opened.manifest
    limit = float(manifest.parity.get("tolerance", TOLERANCE)) if tolerance is None else tolerance
    if not 0 < limit < math.inf:
        raise RequestError(f"tolerance must be positive, got {tolerance}")
    if providers is not None:
        providers = list(dict.fromkeys(providers))
    else:
        providers = [short for short in all_providers() if why_not_usable(short) is None]
    parameters = manifest.param_count
    with small_model_threads(parameters), Verification(providers, limit, parameters, every_prefix) as verification:
        verification.add(opened, [graph for graph in PARTS if graph in manifest.graphs], progress)
        report = verification.report(progress)
    return dataclasses.replace(report, loosened=describe_tolerance(limit, asked=tolerance is not None))


class Verification:
    """A verification in parts. On the CPU a small model's first graphs are verified while its others are being made.

    Only `add` and `report` compute with torch, so that nothing does while it traces. Leaving the block ends it.

    Args:
        providers: short names, each verified on its own.
        tolerance: largest error allowed.
        parameters: of the model. One that is not small takes all cores by itself, as do others than the CPU, which may
            not bear two runs at once: they are run when the report is asked for.
        every_prefix: see verify.
    """

    def __init__(self, providers: Sequence[str], tolerance: float, parameters: int, every_prefix: bool = False) -> None:
        self._providers, self._tolerance, self._every_prefix = list(providers), tolerance, every_prefix
        self._threads = 1 if parameters <= SMALL else None  # as many as torch's, see small_model_threads
        self._at_once = self._threads == 1 and set(providers) == {"cpu"}
        self._runs = SideBySide(self._at_once)
        self._waiting: list[str] = []
        self._reference: Any = None
        self._total = 0

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *error: Any) -> None:
        self._runs.__exit__(*error)

    def add(self, bundle: Bundle, parts: Sequence[str], progress: Progress | None = None) -> None:
        """Has these of PARTS verified, which the bundle has by now; what can be runs on when this returns.

        Args:
            bundle: the one of all calls, with more graphs in later ones.
            parts: those to verify.
            progress: called after each case, with those of all calls so far as the total.

        Raises:
            RequestError: a provider that is not usable, here or in `report`.
            CheckError: the bundle is damaged, here or in `report`.
        """
        self._bundle = bundle
        self._waiting += parts
        if self._at_once:
            self._start(progress)

    def _start(self, progress: Progress | None) -> None:
        bundle, parts, self._waiting = self._bundle, self._waiting, []
        models = {provider: load(bundle, [provider], self._threads) for provider in self._providers}
        if self._reference is None:
            self._reference = _load_reference(bundle)
        for part in parts:
            count, _ = PARTS[part]
            self._total += len(models) * count(bundle, self._reference, self._every_prefix)
        for part in parts:
            _, run = PARTS[part]
            jobs = run(bundle, models, self._reference, self._every_prefix, self._tolerance)
            self._runs.add(jobs, self._counted(progress))

    def _counted(self, progress: Progress | None) -> Done:
        total = self._total
        return lambda done: progress(done, total) if progress is not None else None

    def report(self, progress: Progress | None = None) -> Report:
        """What was found, when all has been run.

        Args:
            progress: called after each case.

        Raises:
            RequestError: see add.
            CheckError: see add; or ONNX Runtime failed.
        """
        if self._waiting:
            self._start(progress)
        reference, bundle = self._reference, self._bundle
        trials = self._runs.results(self._counted(progress))
        failed = [trial for trial in trials if not trial[0].passed]
        if failed and reference is not None and len(failed) <= len(trials) * _MAX_AMPLIFIED:
            from .rounding import with_rounding

            failed = with_rounding(failed, bundle)
        judged = [case for case, _ in trials if case.passed] + [case for case, _ in failed]
        cases = sorted(judged, key=lambda case: -case.severity)
        compared = [case for case in cases if case.source == "reference"]
        window = bundle.manifest.window_size
        report = Report(
            bundle=str(bundle.path),
            reference="float64 reference" if reference else "test data",
            tolerance=self._tolerance,
            providers=self._providers,
            window=window,
            prefixes=len({case.length for case in compared if case.graph == "window" and case.length <= window}),
            frames=len({case.length for case in compared if case.graph == "stream" and case.batch == 1}),
            histories=len({case.length for case in compared if case.graph == "prefill"}),
            cases=cases,
            recurrence_gap=recurrence_gap(reference, window) if reference else None,
        )
        if report.passed or reference is None:
            return report
        # One that failed against the reference, if there is one: of graphs that differ it is not known which is wrong,
        # and of test data from a state not what led there.
        wrong = [trial for trial in failed if not trial[0].passed]
        return _diagnose(report, bundle, reference, max(wrong, key=_tells))


def _tells(trial: Trial) -> tuple[bool, bool, float]:
    """How much a failed case tells of where a graph departs."""
    case, given = trial
    return case.source == "reference", given.state is None and given.restart == 0, case.severity


def _load_reference(bundle: Bundle) -> Any:
    """The float64 reference model of a bundle's weights, or None where torch can't be imported."""
    if why_no_torch() is not None:
        return None
    from ..programs.reference_model import reference_of

    return reference_of(bundle).double()


def recurrence_gap(reference: Any, window: int) -> float | None:
    """The largest difference that an exact recurrence would make within a window; None if the reference's is exact."""
    exact = reference.with_exact_recurrence()
    if exact is None:
        return None
    sequence = np.random.default_rng(0).standard_normal((1, window, reference.config.embed_dim)).astype(np.float32)
    return float(np.abs(reference_prefixes(reference, sequence) - reference_prefixes(exact, sequence)).max())


def _diagnose(report: Report, bundle: Bundle, reference: Any, trial: Trial) -> Report:
    """Adds to a failed report where the graph departs, and whether torch's own float32 does as well."""
    from ..programs.reference_model import reference_of
    from .locate import first_departure
    from .rounding import float32_error

    case, given = trial
    # A stream that goes wrong after a history may have been given a wrong state.
    graphs = ["prefill", "stream"] if case.source == "after prefill" else [case.graph]
    tolerance = report.tolerance
    found = (first_departure(bundle, reference, given.frames, graph, case.provider, tolerance) for graph in graphs)
    departure = next((departure for departure in found if departure is not None), None)
    error = float32_error(reference_of(bundle), trial)
    return dataclasses.replace(report, departure=departure, float32_error=error)
