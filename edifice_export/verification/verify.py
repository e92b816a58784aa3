"""Verify: ONNX Runtime against the float64 reference, at every prefix length, in several batches and magnitudes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import callback, flag, positive, words
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import ARCHITECTURE
from ..defaults import TOLERANCE
from ..errors import RequestError
from ..machine import SMALL, require_torch, small_model_threads, why_no_torch
from ..runtime.model import load
from ..runtime.providers import all_providers, why_not_usable
from ..runtime.version import refuse_old_runtime
from ..standing_in.context import standins
from .calls import count_calls, run_calls
from .report import Report, Trial, describe_tolerance
from .side_by_side import Done, SideBySide
from .streams import count_stream, run_stream
from .windows import count_window, reference_prefixes, run_window

if TYPE_CHECKING:
    from edifice_reference.models.contract import ReferenceModel

    from ..programs.module_program import ModuleProgram
    from ..programs.program import Program
    from ..programs.source import Source
    from .reference import Reference

__all__ = ["PARTS", "Progress", "Verification", "recurrence_gap", "verify"]

PARTS = {"stream": (count_stream, run_stream), "window": (count_window, run_window)}
"""How many comparisons there are of a graph (of the stream with prefill) and their jobs; the longest come first."""

MODULE_PARTS = PARTS | {"window": (count_calls, run_calls)}
"""The same of somebody's module."""

_MAX_AMPLIFIED = 0.25
"""Share of the cases that may be beyond the limit for rounding; weights with more of them need more than float32."""

Progress = Callable[[int, int], None]
"""Called with the number of cases done and of all."""


def verify(
    bundle: str | Path | Bundle,
    providers: Sequence[str] | str | None = None,
    tolerance: float | None = None,
    every_prefix: bool = False,
    progress: Progress | None = None,
    source: Source | None = None,
) -> Report:
    """Compares a bundle's graphs, run by ONNX Runtime, with the float64 reference made of the bundle's own weights.

    Where torch can't be imported, or somebody's module is not given, they are compared with the bundle's test data
    only, and the report says so. Models of up to SMALL parameters are run with one thread.

    Args:
        bundle: its folder.
        providers: short names, each verified on its own; every usable one if None.
        tolerance: largest error allowed; the one that the bundle was made with if None.
        every_prefix: run every prefix length even of a window above EVERY_PREFIX frames.
        progress: called after each case.
        source: of a bundle that `export` made, the module with its args. It must have the weights that the bundle was
            made from.

    Raises:
        RequestError: not a bundle, a provider that is not usable, a tolerance that is not positive, another module.
        CheckError: the bundle is damaged.
    """
    asked = positive("tolerance", tolerance) if tolerance is not None else None
    if providers is not None:
        providers = list(dict.fromkeys(words("providers", providers)))
    every_prefix, progress = flag("every_prefix", every_prefix), callback("progress", progress)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    refuse_old_runtime()  # which runs no provider
    manifest = opened.manifest
    limit = float(manifest.parity.get("tolerance", TOLERANCE)) if asked is None else asked
    if providers is None:
        providers = [short for short in all_providers() if why_not_usable(short) is None]
    within = standins() if source is not None else contextlib.nullcontext()
    with within:
        module = _module_of(opened, source)
        parameters = manifest.param_count
        with (
            small_model_threads(parameters),
            Verification(providers, limit, parameters, every_prefix, module) as verification,
        ):
            verification.add(opened, [graph for graph in PARTS if graph in manifest.graphs], progress)
            report = verification.report(progress)
    return dataclasses.replace(report, loosened=describe_tolerance(limit, asked=asked is not None))


def _module_of(bundle: Bundle, source: Source | None) -> ModuleProgram | None:
    """The module that a bundle was made from, where the user names it.

    Raises:
        RequestError: it is another, or the bundle is of none.
    """
    if source is None:
        return None
    from ..programs.source import Source

    if not isinstance(source, Source):
        raise RequestError(f"source must be an edifice_export.Source, got {source!r:.80}")
    if bundle.manifest.program.kind == ARCHITECTURE:
        raise RequestError(f"--source: {bundle.path} is of an architecture, which it makes again itself; leave it out")
    require_torch()
    from ..programs.module_program import ModuleProgram

    program = ModuleProgram(source)
    name, made = bundle.manifest.program.name, bundle.manifest.weights.get("sha256")
    if program.entry.name != name or program.fingerprint != made:
        raise RequestError(
            f"--source: is a {program.entry.name} with weights {program.fingerprint[:12]}, and {bundle.path} was made "
            f"of a {name} with weights {str(made)[:12]}; name that, or export this one"
        )
    if set(bundle.manifest.graphs) != set(program.graphs):
        raise RequestError(
            f"--source: gives the graphs {', '.join(program.graphs)}, and {bundle.path} has "
            f"{', '.join(bundle.manifest.graphs)}; name what it was made of"
        )
    for graph, entry in bundle.manifest.graphs.items():
        wanted, found = (list(map(str, specs)) for specs in (entry.inputs, program.inputs(graph)))
        names, gives = [spec.name for spec in entry.outputs], [*map(str, program.outputs(graph))]
        if wanted != found or names != gives:
            raise RequestError(
                f"--source: takes {', '.join(found)} and gives {', '.join(gives)}, and the {graph} graph of "
                f"{bundle.path} takes {', '.join(wanted)} and gives {', '.join(names)}; name what it was made of"
            )
    return program


class Verification:
    """A verification in parts. On the CPU a small model's first graphs are verified while its others are being made.

    Only `add` and `report` compute with torch, so that nothing does while it traces. Leaving the block ends it.

    Args:
        providers: short names, each verified on its own.
        tolerance: largest error allowed.
        parameters: of the model. One that is not small takes all cores by itself, as do others than the CPU, which may
            not bear two runs at once: they are run when the report is asked for.
        every_prefix: see verify.
        program: what the bundle is of, where it is at hand: no bundle makes somebody's module again.
    """

    def __init__(
        self,
        providers: Sequence[str],
        tolerance: float,
        parameters: int,
        every_prefix: bool = False,
        program: Program | None = None,
    ) -> None:
        self._program = program
        self._providers, self._tolerance, self._every_prefix = list(providers), tolerance, every_prefix
        self._threads = 1 if parameters <= SMALL else None  # as many as torch's, see small_model_threads
        self._at_once = self._threads == 1 and set(providers) == {"cpu"}
        self._runs = SideBySide(self._at_once)
        self._waiting: list[str] = []
        self._reference: Reference | None = None
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
            self._reference = _load_reference(bundle, self._program)
        known = PARTS if bundle.manifest.program.kind == ARCHITECTURE else MODULE_PARTS
        for part in parts:
            count, _ = known[part]
            self._total += len(models) * count(bundle, self._reference, self._every_prefix)
        for part in parts:
            _, run = known[part]
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

            failed = with_rounding(failed, reference)
        judged = [case for case, _ in trials if case.passed] + [case for case, _ in failed]
        cases = sorted(judged, key=lambda case: -case.severity)
        compared = [case for case in cases if case.source == "reference"]
        windows = [case for case in compared if case.graph == "window"]
        window = bundle.manifest.window_size
        report = Report(
            bundle=str(bundle.path),
            reference=reference.title if reference is not None else "test data",
            tolerance=self._tolerance,
            providers=self._providers,
            window=window,
            prefixes=len({case.length for case in windows if not case.sizes and case.length <= window}),
            frames=len({case.length for case in compared if case.graph == "stream" and case.batch == 1}),
            histories=len({case.length for case in compared if case.graph == "prefill"}),
            sizes=len({case.sizes for case in compared if case.sizes}),
            cases=cases,
            recurrence_gap=_gap_of(reference, window),
            why_test_data=_why_test_data(bundle) if reference is None else None,
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


def _load_reference(bundle: Bundle, program: Program | None) -> Reference | None:
    """The reference of a bundle; None where torch can't be imported, or of a module that is not at hand."""
    if why_no_torch() is not None:
        return None
    from ..programs.module_program import ModuleProgram
    from .reference import ArchitectureReference, ModuleReference

    if bundle.manifest.program.kind == ARCHITECTURE:
        return ArchitectureReference(bundle)  # of what was written
    return ModuleReference(program) if isinstance(program, ModuleProgram) else None


def _why_test_data(bundle: Bundle) -> str:
    if why_no_torch() is not None:
        return "the float64 reference needs torch, which can't be imported here"
    return (
        f"{bundle.manifest.program.name} is somebody's module; name the code that makes it with --source FILE.py:NAME"
    )


def _gap_of(reference: Reference | None, window: int) -> float | None:
    model = getattr(reference, "model", None)  # of an architecture
    return recurrence_gap(model, window) if model is not None else None


def recurrence_gap(reference: ReferenceModel, window: int) -> float | None:
    """The largest difference that an exact recurrence would make within a window; None if the reference's is exact."""
    exact = reference.with_exact_recurrence()
    if exact is None:
        return None
    sequence = np.random.default_rng(0).standard_normal((1, window, reference.config.embed_dim)).astype(np.float32)
    return float(np.abs(reference_prefixes(reference, sequence) - reference_prefixes(exact, sequence)).max())


def _diagnose(report: Report, bundle: Bundle, reference: Reference, trial: Trial) -> Report:
    """Adds to a failed report where the graph departs, and whether torch's own float32 does as well."""
    from .locate import first_departure
    from .rounding import float32_error

    case, given = trial
    # A stream that goes wrong after a history may have been given a wrong state.
    graphs = ["prefill", "stream"] if case.source == "after prefill" else [case.graph]
    tolerance = report.tolerance
    found = (first_departure(bundle, reference, given, graph, case.provider, tolerance) for graph in graphs)
    departure = next((departure for departure in found if departure is not None), None)
    error = float32_error(reference, trial)
    return dataclasses.replace(report, departure=departure, float32_error=error)
