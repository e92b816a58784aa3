"""Side by side: comparisons in threads, while the thread that asks for them goes on."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

from .report import Trial

__all__ = ["SideBySide"]

_MOST = 4
"""Threads at most: a job or two are half of the work."""


class SideBySide:
    """Runs jobs in threads, as ONNX Runtime leaves the interpreter to others. Leaving the block ends what still runs.

    Args:
        at_once: whether several jobs may run at once; if not, each is made and run in turn when results are asked for.
    """

    def __init__(self, at_once: bool) -> None:
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST)) if at_once else None
        self._waiting: list[Iterable[Iterator[Trial]]] = []
        self._jobs: list[Future[list[Trial]]] = []
        self._stop = threading.Event()
        self._ended: SimpleQueue[bool] = SimpleQueue()  # True of a job, False of a comparison

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, jobs: Iterable[Iterator[Trial]]) -> None:
        """Starts each job as soon as it is made."""
        if self._pool is None:
            self._waiting.append(jobs)
            return
        for job in jobs:
            self._jobs.append(self._pool.submit(self._run, job))

    def results(self, progress: Callable[[int], None]) -> list[Trial]:
        """What all jobs gave, in their order, when they have ended.

        Args:
            progress: called in this thread after each comparison, with the number of those done.

        Raises:
            Exception: what a job raised; the others are ended then.
        """
        if self._pool is None:
            trials = []
            for job in itertools.chain.from_iterable(self._waiting):
                for trial in job:
                    trials.append(trial)
                    progress(len(trials))
            return trials
        done, running = 0, len(self._jobs)
        while running:
            if self._ended.get():
                running -= 1
            else:
                done += 1
                progress(done)
        errors = [error for job in self._jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]
        return [trial for job in self._jobs for trial in job.result()]

    def _run(self, job: Iterator[Trial]) -> list[Trial]:
        trials = []
        try:
            for trial in job:
                if self._stop.is_set():
                    break
                trials.append(trial)
                self._ended.put(False)
        except BaseException:
            self._stop.set()
            raise
        finally:
            self._ended.put(True)
        return trials
