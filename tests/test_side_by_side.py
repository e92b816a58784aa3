"""Comparisons in threads: their order, what ends them, and that a build makes them while it traces."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import flip, raising
from conftest import ANY, TINY

import edifice_export as ee
from edifice_export.building import assemble
from edifice_export.verification import verify as parity
from edifice_export.verification import windows as window_parity
from edifice_export.verification.report import Case, Trial
from edifice_export.verification.side_by_side import _THREADS, SideBySide

WAIT = 60.0
"""Seconds after which what should happen is taken not to."""


def trial(length: int) -> Trial:
    return Case("window", "cpu", "reference", 1, length, 0, 1.0, 0.0, 0.0, 1.0), np.zeros(1)


def lengths(trials: list[Trial]) -> list[int]:
    return [case.length for case, _ in trials]


def job(numbers: range) -> Iterator[Trial]:
    yield from map(trial, numbers)


@pytest.mark.parametrize("at_once", [True, False])
def test_every_comparison_is_counted_and_given(at_once: bool) -> None:
    calls: list[int] = []
    with SideBySide(at_once) as runs:
        runs.add((job(range(start, start + 7)) for start in range(0, 70, 7)), calls.append)
        runs.add([job(range(70, 75)), job(range(0))], calls.append)
        assert lengths(runs.results(calls.append)) == list(range(75))
    assert calls == list(range(1, 76))


def test_no_jobs_have_no_results() -> None:
    with SideBySide(True) as runs:
        assert runs.results(ignore) == []


def test_results_are_in_the_order_of_the_jobs() -> None:
    """And they do run at once."""
    overtaken = threading.Event()

    def first() -> Iterator[Trial]:
        assert overtaken.wait(WAIT)
        yield trial(1)

    def second() -> Iterator[Trial]:
        yield trial(2)
        overtaken.set()

    with SideBySide(True) as runs:
        runs.add([first(), second()], ignore)
        assert lengths(runs.results(ignore)) == [1, 2]


def test_progress_is_made_while_jobs_are_added() -> None:
    calls: list[int] = []
    done = threading.Event()

    def jobs() -> Iterator[Iterator[Trial]]:
        yield job(range(5))
        yield note(done)
        assert done.wait(WAIT)
        yield job(range(1))
        assert max(calls) >= 5

    with SideBySide(True) as runs:
        runs.add(jobs(), calls.append)
        assert len(runs.results(calls.append)) == 7


def note(event: threading.Event) -> Iterator[Trial]:
    yield trial(0)
    event.set()


def test_jobs_that_run_alone_are_made_one_by_one() -> None:
    """In the thread that adds them."""
    seen: list[tuple[str, int]] = []

    def jobs() -> Iterator[Iterator[Trial]]:
        for number in range(9):
            seen.append(("made", number))
            yield running(number)

    def running(number: int) -> Iterator[Trial]:
        assert threading.current_thread() is threading.main_thread()
        yield trial(number)
        seen.append(("ended", number))

    with SideBySide(False) as runs:
        runs.add(jobs(), ignore)
        runs.results(ignore)
    assert seen == [(what, number) for number in range(9) for what in ("made", "ended")]


def endless(started: threading.Event) -> Iterator[Trial]:
    for number in itertools.count():
        started.set()
        yield trial(number)


def fail() -> Iterator[Trial]:
    yield trial(1)
    raise ee.CheckError("no such file")


def test_a_job_that_fails_ends_the_others() -> None:
    before, made = threading.active_count(), itertools.count()
    failed = threading.Event()

    def failing() -> Iterator[Trial]:
        try:
            yield from fail()
        finally:
            failed.set()

    def jobs() -> Iterator[Iterator[Trial]]:
        yield endless(threading.Event())
        yield failing()
        assert failed.wait(WAIT)
        for _ in made:  # what the reference takes its time for
            time.sleep(0.01)
            yield endless(threading.Event())

    with SideBySide(True) as runs:
        runs.add(jobs(), ignore)
        with pytest.raises(ee.CheckError, match="no such file"):
            runs.results(ignore)
    assert threading.active_count() == before
    assert next(made) < 100


def test_a_job_that_fails_alone_is_the_last() -> None:
    later = threading.Event()
    with SideBySide(False) as runs, pytest.raises(ee.CheckError, match="no such file"):
        runs.add([fail(), endless(later)], ignore)
    assert not later.is_set()


@pytest.mark.parametrize("where", ["add", "results"])
def test_leaving_ends_what_runs_and_what_waits(where: str) -> None:
    before, started = threading.active_count(), threading.Event()
    ended, later = threading.Event(), threading.Event()

    def slow() -> Iterator[Trial]:
        for number in range(500):
            started.set()
            yield trial(number)
            time.sleep(0.01)
        ended.set()

    def waiting() -> Iterator[Trial]:
        later.set()
        yield trial(0)

    with SideBySide(True) as runs:
        runs.add([slow() for _ in range(_THREADS)], ignore)
        runs.add([waiting()], ignore)
        assert started.wait(WAIT)
        with pytest.raises(KeyboardInterrupt):
            leave(runs, where)
    assert threading.active_count() == before
    assert not ended.is_set()
    assert not later.is_set()


def leave(runs: SideBySide, where: str) -> None:
    interrupt = raising(KeyboardInterrupt())
    if where == "results":
        runs.results(interrupt)
    runs.add((interrupt() for _ in range(1)), ignore)


def ignore(_: int) -> None:
    """No progress is shown."""


# In a build


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the window graph is first compared."""
    event, real = threading.Event(), window_parity.compare

    def compare(*arguments: Any, **named: Any) -> Case:
        event.set()
        return real(*arguments, **named)

    monkeypatch.setattr(window_parity, "compare", compare)
    return event


def test_the_window_is_verified_while_the_stream_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: threading.Event
) -> None:
    real = assemble._make_graph

    def write(folder: Path, program: Any, manifest: Any, name: str, *rest: Any) -> Any:
        assert name == "window" or compared.wait(WAIT)
        return real(folder, program, manifest, name, *rest)

    monkeypatch.setattr(assemble, "_make_graph", write)
    bundle = ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert bundle.path == tmp_path / "bot"
    assert bundle.manifest.parity["cases"] == len(ee.verify(bundle, ["cpu"]).cases)


def test_a_large_model_is_verified_when_all_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: threading.Event
) -> None:
    """It takes all cores by itself; what is compared is the same."""
    real = assemble._make_graph

    def write(*arguments: Any) -> Any:
        assert not compared.is_set()
        return real(*arguments)

    monkeypatch.setattr(assemble, "_make_graph", write)
    monkeypatch.setattr(parity, "SMALL", 0)
    bundle = ee.build(ANY, output=tmp_path / "bot", **TINY)
    alone = ee.verify(bundle, ["cpu"])
    monkeypatch.undo()
    assert sorted(map(what, alone.cases)) == sorted(map(what, ee.verify(bundle, ["cpu"]).cases))


def what(case: Case) -> tuple[Any, ...]:
    """What a case compares."""
    return case.graph, case.source, case.batch, case.length, case.seed, case.magnitude


def test_a_stream_that_can_not_be_made_ends_the_verification_of_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: threading.Event
) -> None:
    before, real = threading.active_count(), assemble._make_graph

    def write(folder: Path, program: Any, manifest: Any, name: str, *rest: Any) -> Any:
        if name == "stream":
            assert compared.wait(WAIT)
            raise ee.CheckError("frozen")
        return real(folder, program, manifest, name, *rest)

    monkeypatch.setattr(assemble, "_make_graph", write)
    with pytest.raises(ee.CheckError, match="frozen"):
        ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert threading.active_count() == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "window/model.onnx",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("weights.safetensors", "window/test_data_set_0/output_0.pb")
        ),
    ],
)
def test_what_is_verified_is_what_is_vouched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A file that changes after the window was verified, while the rest is made."""
    real = assemble._make_graph

    def write(folder: Path, program: Any, manifest: Any, graph: str, *rest: Any) -> Any:
        written = real(folder, program, manifest, graph, *rest)
        if graph == "prefill":
            flip(folder / name, -1)
        return written

    monkeypatch.setattr(assemble, "_make_graph", write)
    with pytest.raises(ee.CheckError, match=f"{name} was changed since it was verified"):
        ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert not any(tmp_path.iterdir())


def test_a_window_that_is_wrong_is_refused_though_the_stream_is_traced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = window_parity.reference_prefixes
    monkeypatch.setattr(window_parity, "reference_prefixes", lambda *given: real(*given) + 1)
    with pytest.raises(ee.CheckError, match=f"{ANY} was not written: .*window"):
        ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert not any(tmp_path.iterdir())
