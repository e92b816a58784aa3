"""Comparisons in threads: their order, what ends them, and that a build makes them while it traces."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import raising
from conftest import ANY, TINY

import edifice_export as ee
from edifice_export import export, parity, window_parity
from edifice_export.report import Case, Trial
from edifice_export.side_by_side import SideBySide

WAIT = 60.0
"""Seconds after which what should happen is taken not to."""


def trial(length: int) -> Trial:
    return Case("window", "cpu", "reference", 1, length, 0, 1.0, 0.0, 0.0, 1.0), np.zeros(1)


def lengths(trials: list[Trial]) -> list[int]:
    return [case.length for case, _ in trials]


def job(numbers: range) -> Iterator[Trial]:
    yield from map(trial, numbers)


@pytest.mark.parametrize("at_once", [True, False])
def test_results_are_in_the_order_of_the_jobs(at_once: bool) -> None:
    calls: list[int] = []
    with SideBySide(at_once) as runs:
        runs.add(job(range(start, start + 7)) for start in range(0, 70, 7))
        runs.add([job(range(70, 75)), job(range(0))])
        assert lengths(runs.results(calls.append)) == list(range(75))
    assert calls == list(range(1, 76))


def test_no_jobs_have_no_results() -> None:
    with SideBySide(True) as runs:
        assert runs.results(lambda _: None) == []


@pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="one core has one thread")
def test_jobs_run_at_once() -> None:
    meeting = threading.Barrier(2)

    def meet() -> Iterator[Trial]:
        meeting.wait(WAIT)
        yield trial(1)

    with SideBySide(True) as runs:
        runs.add([meet(), meet()])
        assert lengths(runs.results(lambda _: None)) == [1, 1]


def test_jobs_of_others_than_the_cpu_run_alone_and_in_order() -> None:
    seen: list[tuple[str, int]] = []

    def note(number: int) -> Iterator[Trial]:
        seen.append(("begins", number))
        yield trial(number)
        seen.append(("ends", number))

    with SideBySide(False) as runs:
        runs.add(map(note, range(9)))
        runs.results(lambda _: None)
    assert seen == [(what, number) for number in range(9) for what in ("begins", "ends")]


def endless(started: threading.Event) -> Iterator[Trial]:
    for number in itertools.count():
        started.set()
        yield trial(number)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_job_that_fails_ends_the_others(at_once: bool) -> None:
    def fail() -> Iterator[Trial]:
        yield trial(1)
        raise ee.CheckError("no such file")

    before, started = threading.active_count(), threading.Event()
    with SideBySide(at_once) as runs:
        runs.add([fail(), endless(started)])
        with pytest.raises(ee.CheckError, match="no such file"):
            runs.results(lambda _: None)
    assert threading.active_count() == before


def test_leaving_ends_what_runs_and_what_waits() -> None:
    before, started, later = threading.active_count(), threading.Event(), threading.Event()
    with SideBySide(False) as runs:
        runs.add([endless(started), endless(later)])
        with pytest.raises(KeyboardInterrupt):
            runs.results(raising(KeyboardInterrupt()))
    assert threading.active_count() == before
    assert started.is_set()
    assert not later.is_set()


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
    real = export._write_graph

    def write(*arguments: Any) -> None:
        assert arguments[-1] == "window" or compared.wait(WAIT)
        real(*arguments)

    monkeypatch.setattr(export, "_write_graph", write)
    bundle = ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert bundle.path == tmp_path / "bot"
    assert bundle.manifest.parity["cases"] == len(ee.verify(bundle, ["cpu"]).cases)


def test_a_large_model_is_verified_when_all_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: threading.Event
) -> None:
    """It takes all cores by itself; what is compared is the same."""
    real = export._write_graph

    def write(*arguments: Any) -> None:
        assert not compared.is_set()
        real(*arguments)

    monkeypatch.setattr(export, "_write_graph", write)
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
    before, real = threading.active_count(), export._write_graph

    def write(*arguments: Any) -> None:
        if arguments[-1] == "stream":
            assert compared.wait(WAIT)
            raise ee.CheckError("frozen")
        real(*arguments)

    monkeypatch.setattr(export, "_write_graph", write)
    with pytest.raises(ee.CheckError, match="frozen"):
        ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert threading.active_count() == before
    assert not any(tmp_path.iterdir())


def test_a_window_that_is_wrong_is_refused_though_the_stream_is_traced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = window_parity.reference_prefixes
    monkeypatch.setattr(window_parity, "reference_prefixes", lambda *given: real(*given) + 1)
    with pytest.raises(ee.CheckError, match=f"{ANY} was not written: .*window"):
        ee.build(ANY, output=tmp_path / "bot", **TINY)
    assert not any(tmp_path.iterdir())
