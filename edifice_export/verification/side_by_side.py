"""Side by side: comparisons in threads, while the thread that asks for them goes on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

from .report import Trial

__all__ = ["Done", "SideBySide"]

_THREADS = 2
"""Beside the one that makes the jobs: a job or two are half of the work."""

Done = Callable[[int], None]
"""Called with the number of comparisons done."""


class SideBySide:
    """Runs jobs in threads, as ONNX Runtime leaves the interpreter to others. Leaving the block ends what still runs.

    Args:
        at_once: whether several jobs may run at once; if not, they run as they are added, in the thread that adds them.
    """

    def __init__(self, at_once: bool) -> None:
        self._pool = ThreadPoolExecutor(_THREADS) if at_once else None
        self._found: list[Trial] = []
        self._jobs: list[Future[list[Trial]]] = []
        self._stop = threading.Event()
        self._ended: SimpleQueue[bool] = SimpleQueue()  # True of a job, False of a comparison
        self._done, self._running = 0, 0

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, jobs: Iterable[Iterator[Trial]], progress: Done) -> None:
        """Starts each job as soon as it is made; none after one has failed, which `results` will say.

        Args:
            jobs: to run.
            progress: called in this thread for each comparison; of jobs that run at once, when the next is made.

        Raises:
            Exception: what a job raised that runs in this thread.
        """
        if self._pool is None:
            for trial in itertools.chain.from_iterable(jobs):
                self._found.append(trial)
                progress(len(self._found))
            return
        for job in jobs:
            self._running += 1
            self._jobs.append(self._pool.submit(self._run, job))
            self._jobs[-1].add_done_callback(self._end)
            while not self._ended.empty():
                self._take(progress)
            if self._stop.is_set():
                return

    def results(self, progress: Done) -> list[Trial]:
        """What all jobs gave, in their order, when they have ended.

        Args:
            progress: called in this thread for each comparison as it is done.

        Raises:
            Exception: what a job raised; the others are ended then.
        """
        while self._running:
            self._take(progress)
        errors = [error for job in self._jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]
        return self._found + [trial for job in self._jobs for trial in job.result()]

    def _take(self, progress: Done) -> None:
        if self._ended.get():
            self._running -= 1
        else:
            self._done += 1
            progress(self._done)

    def _run(self, job: Iterator[Trial]) -> list[Trial]:
        trials = []
        while not self._stop.is_set() and (trial := next(job, None)) is not None:
            trials.append(trial)
            self._ended.put(False)
        return trials

    def _end(self, job: Future[list[Trial]]) -> None:
        if not job.cancelled() and job.exception() is not None:
            self._stop.set()
        self._ended.put(True)
