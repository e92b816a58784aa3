"""Bench: what a bundle's graphs cost on this machine, beside the products that they can't do without, and others.

Contestants take turns: a round runs each of them once. What disturbs the machine for a while disturbs all of them, and
their ratio, within one run, says more than milliseconds of different runs.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import callback, words
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import ARCHITECTURE
from ..defaults import TOLERANCE
from ..errors import CheckError, RequestError, brief
from ..machine import require_torch, torch_threads, why_no_torch
from ..runtime.providers import ORT_ERRORS
from ..verification.report import compare, describe_tolerance
from .contestants import Contestant, Subject, bundle_contestants, forward
from .footprint import footprint
from .plan import Point, check_against, check_rounds, plan
from .results import BenchReport, BenchResult, machine

__all__ = ["bench", "take_turns"]

_SECONDS = 1.2
"""For one point, unless a number of rounds is asked for."""

_ROUNDS = (10, 1000)
"""The fewest and the most that fit into it."""

_PAUSE = 0.05
"""Seconds before each turn where there are several threads: those of ONNX Runtime keep a processor busy for a while
after a run, in case there is another, and would slow down what comes next."""


def bench(
    bundle: str | Path | Bundle,
    *,
    providers: Sequence[str] | str = ("cpu",),
    graph: str = "both",
    threads: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    against: Sequence[str] = (),
    rounds: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Measures the latency and throughput of a bundle's graphs on this machine.

    The outputs of all that is timed are compared with the float64 reference first. Without torch, and of somebody's
    module, there is no reference and there are no products, and the report says so.

    Args:
        bundle: its folder.
        providers: short names in order of preference, for the bundle and for plain-onnx; all else is on the CPU.
        graph: `window`, `stream` (frame by frame, and a piece of a few frames at once) or `both`.
        threads: within an operator, of ONNX Runtime and of torch; 1 and this machine's processors (4 at most) if None.
        batch: windows or streams side by side; 1 and 8 if None.
        length: frames of a window; if None the bundle's window, a quarter of it, and four times as many frames where
            the graph takes them.
        against: `eager` (the torch reference model), `compile` (torch.compile of it), `plain-onnx` (of torch's own
            exporter). The last two are made for each batch and length, which takes up to minutes: beside them only the
            first of the default values is measured.
        rounds: how often each contestant is timed; if None as often as there is time for, 10 to 1000 times.
        progress: called with the points done and all.

    Raises:
        RequestError: not a bundle, a provider that is not usable, an alternative that there is not or that does not
            work here, a number out of range.
        CheckError: the bundle is damaged, or an output is not what the reference gives.
    """
    names, progress = words("providers", providers), callback("progress", progress)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    wanted = check_against(against)
    check_rounds(rounds)
    points = plan(opened, graph, threads, batch, length, wanted)
    if wanted:
        if opened.manifest.program.kind != ARCHITECTURE:
            raise RequestError(f"against {wanted[0]}: is for architectures, and {opened.path} is of somebody's module")
        require_torch(f"against {wanted[0]}")
    subject, results = Subject(opened, names), []
    for done, point in enumerate(points):
        if progress is not None:
            progress(done, len(points))
        results += _measure(subject, point, wanted, rounds)
    model, without = subject.model(points[0].threads), why_no_torch()
    loosened = describe_tolerance(float(opened.manifest.parity.get("tolerance", TOLERANCE)))
    notes = [loosened] if loosened is not None else []
    notes += [f"passed over {name}: {reason}" for name, reason in model.passed_over.items()]
    if opened.manifest.program.kind != ARCHITECTURE:
        notes.append("no products, and outputs not compared: this is somebody's module")
    elif without is not None:
        notes.append(f"no products, and outputs not compared: torch can't be imported here ({without})")
    manifest = opened.manifest
    if manifest.grows and any(point.graph != "window" for point in points):
        notes.append(f"frames of a stream are measured after {manifest.window_size} others: its states grow")
    return BenchReport(
        bundle=str(opened.path),
        program=manifest.program.name,
        numerics=manifest.program.numerics,
        window=manifest.window_size,
        providers=model.placement,
        machine=machine(),
        notes=notes,
        results=results,
    )


def take_turns(
    calls: Sequence[Callable[[], object]], rounds: int | None = None, pause: float = 0.0
) -> list[tuple[float, ...]]:
    """Times calls in turn, one of each in every round.

    Args:
        calls: what is timed.
        rounds: how many rounds count; if None, as many as fit into _SECONDS. A tenth as many go before, uncounted.
        pause: seconds before each call.

    Returns:
        Milliseconds of every round, for each call.
    """

    def play() -> list[float]:
        times = []
        for call in calls:
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    play()
    if rounds is None:
        start = time.perf_counter()
        play()
        fewest, most = _ROUNDS
        rounds = min(max(int(_SECONDS / (time.perf_counter() - start)), fewest), most)
    for _ in range(rounds // 10):
        play()
    return list(zip(*(play() for _ in range(rounds)), strict=True))


def _measure(subject: Subject, point: Point, against: Sequence[str], rounds: int | None) -> list[BenchResult]:
    inputs = subject.inputs(point)
    frames = next(iter(inputs.values()))  # all that an architecture takes
    with torch_threads(point.threads), tempfile.TemporaryDirectory(prefix="edifice-export-") as folder:
        contestants = bundle_contestants(subject, point, inputs)
        if subject.reference is not None:
            from .products import products

            contestants += products(subject, point, frames, Path(folder))
        if subject.reference is not None and against:
            from .alternatives import alternatives

            contestants += alternatives(subject, subject.reference, point, frames, against, Path(folder))
        errors = _compare(subject, point, frames, contestants)
        pause = _PAUSE if point.threads > 1 else 0.0
        times = take_turns([contestant.run for contestant in contestants], rounds, pause)
        results = [
            BenchResult(**dataclasses.asdict(point), contestant=contestant.name, times=taken, error=error)
            for contestant, taken, error in zip(contestants, times, errors, strict=True)
        ]
        base = next((result.median_ms for result in results if result.contestant == "products"), None)
        return [
            dataclasses.replace(
                result, ratio=result.median_ms / base if base else None, **_costs(subject, point, contestant)
            )
            for result, contestant in zip(results, contestants, strict=True)
        ]


def _compare(
    subject: Subject, point: Point, frames: np.ndarray, contestants: Sequence[Contestant]
) -> list[float | None]:
    """Runs every contestant once; the error of each that has an output.

    Raises:
        CheckError: an output is not what the reference gives, or ONNX Runtime failed.
    """
    try:
        outputs = [contestant.run() for contestant in contestants]
    except ORT_ERRORS as error:
        raise CheckError(
            f"running {point.graph} on {list(frames.shape)} failed: {brief(error)}; ask for a smaller batch or "
            "length, or see what `edifice-export verify` says"
        ) from error
    if subject.reference is None:
        return [None] * len(outputs)
    import torch

    with torch.inference_mode():
        expected = forward(subject.exact, point, torch.tensor(frames).double())().numpy()
        # Some weights amplify rounding in any float32 computation, as in verify.
        plain = forward(subject.reference, point, torch.tensor(frames))().double().numpy()
    tolerance = float(subject.bundle.manifest.parity.get("tolerance", TOLERANCE))
    errors: list[float | None] = []
    for contestant, output in zip(contestants, outputs, strict=True):
        if output is None:
            errors.append(None)
            continue
        case = compare(
            np.asarray(output).astype(np.float64),
            expected,
            tolerance,
            graph=point.graph,
            provider=contestant.name,
            source="reference",
            batch=point.batch,
            length=point.length,
            seed=0,
            magnitude=1.0,
            rounding=float(np.abs(plain - expected).max()),
        )
        if not case.passed:
            raise CheckError(
                f"{contestant.name} was not timed: the output of {point.graph}, batch {point.batch}, length "
                f"{point.length}, departs from the float64 reference by {case.max_abs:.1e}, and {case.allowed:.1e} is "
                "allowed"
            )
        errors.append(case.max_abs)
    return errors


def _costs(subject: Subject, point: Point, contestant: Contestant) -> dict[str, Any]:
    if contestant.model is None:
        return {}
    found = footprint(contestant.model, contestant.inputs, subject.providers, point.threads)
    return dataclasses.asdict(found)
