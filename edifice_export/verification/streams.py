"""Verification of a stream: frame by frame, from histories, in batches, and back to where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import CheckError, brief
from ..runtime.arrays import MAX_MAGNITUDE
from ..runtime.model import Model
from ..runtime.providers import ORT_ERRORS
from .report import Given, Trial, attempt, compare

__all__ = ["count_stream", "run_stream"]

WINDOWS = 10
"""Windows that a stream is followed for, frame by frame."""

LONG_WINDOW, LONG_WINDOWS = 256, 3
"""Of a window above this size a stream is followed for as many frames, and at places of so many windows further on."""

HANDOVERS, AFTER = 5, 4
"""Random places at which a stream starts from a history, and frames that it then goes on."""

BATCH = 3
MAGNITUDES = (1e-3, 1e3, MAX_MAGNITUDE)
AGAIN = 64
"""Most frames that are run again from a snapshot."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is run of one random sequence.

    Attributes:
        steps: frames from the start, one by one.
        handovers: frames of the histories that streams start from.
        batch_frames: frames of a batch.
    """

    steps: int
    handovers: tuple[int, ...]
    batch_frames: int

    @classmethod
    def of(cls, window: int, every_frame: bool) -> _Plan:
        whole = every_frame or window <= LONG_WINDOW
        last = (WINDOWS if whole else LONG_WINDOWS) * window
        places = np.random.default_rng(window).integers(1, last, HANDOVERS, endpoint=True)
        handovers = sorted({1, window, window + 1, *map(int, places)})
        return cls(last if whole else LONG_WINDOW, tuple(handovers), 2 * min(window, LONG_WINDOW))

    @property
    def frames(self) -> int:
        return max(self.steps, *(place + AFTER for place in self.handovers))


def count_stream(bundle: Bundle, reference: Any, every_frame: bool) -> int:
    """How many comparisons run_stream makes for each provider."""
    graphs = bundle.manifest.graphs
    sets = len(graphs["stream"].test_data) + len(graphs["prefill"].test_data) + (bundle.test_sequence() is not None)
    if reference is None:
        return sets
    window = bundle.manifest.window_size
    plan = _Plan.of(window, every_frame)
    windows = min(plan.steps, window) if "window" in graphs else 0
    late = plan.batch_frames - plan.batch_frames // 2
    handovers = len(plan.handovers) * (1 + AFTER)
    return sets + plan.steps + 1 + windows + handovers + len(MAGNITUDES) * AFTER + 2 * plan.batch_frames + late


def run_stream(
    bundle: Bundle, models: Mapping[str, Model], reference: Any, every_frame: bool, tolerance: float
) -> Iterator[Iterator[Trial]]:
    """Every comparison of the stream and prefill graphs, as jobs that only run ONNX Runtime, see run_window.

    Args:
        bundle: with a stream.
        models: by provider.
        reference: in float64, or None to compare with the test data only.
        every_frame: follow the stream frame by frame even with a window above LONG_WINDOW.
        tolerance: see defaults.TOLERANCE.
    """
    for provider, model in models.items():
        yield _run_test_data(bundle, model, provider, tolerance)
    if reference is None:
        return
    plan = _Plan.of(bundle.manifest.window_size, every_frame)
    sequence = _sequence(bundle, 1, plan.frames)
    expected = _expected(reference, sequence)
    for provider, model in models.items():
        judge = _Judge(provider, tolerance, sequence)
        yield _run_steps(model, judge, expected, plan.steps)
        yield _run_handovers(model, judge, expected, plan.handovers)
    sequence = _sequence(bundle, BATCH, plan.batch_frames)
    expected = _expected(reference, sequence)
    fresh = _expected(reference, sequence[:1, plan.batch_frames // 2 :])
    for provider, model in models.items():
        yield _run_batch(model, _Judge(provider, tolerance, sequence), expected, fresh)
    for magnitude in MAGNITUDES:
        sequence = (_sequence(bundle, 1, AFTER) * np.float32(magnitude)).clip(-MAX_MAGNITUDE, MAX_MAGNITUDE)
        expected = _expected(reference, sequence)
        for provider, model in models.items():
            yield _run_start(model, _Judge(provider, tolerance, sequence, magnitude), expected)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Compares with what is expected after so many frames of a sequence."""

    provider: str
    tolerance: float
    sequence: np.ndarray
    magnitude: float = 1.0

    def __call__(
        self, graph: str, source: str, length: int, found: np.ndarray, expected: np.ndarray, **given: Any
    ) -> Trial:
        """A comparison after so many frames; **given are the fields of Given but for the frames."""
        case = compare(
            found,
            expected.astype(np.float64),
            self.tolerance,
            graph=graph,
            provider=self.provider,
            source=source,
            batch=self.sequence.shape[0],
            length=length,
            seed=self.sequence.shape[0],
            magnitude=self.magnitude,
        )
        return case, Given(self.sequence[:, :length], **given)


def _run_steps(model: Model, judge: _Judge, expected: np.ndarray, steps: int) -> Iterator[Trial]:
    """Frame by frame against the reference and, within the window, the window graph; then again from a snapshot."""
    sequence, stream, outputs = judge.sequence, model.stream(1), []
    half, window = steps // 2, model.window_size if model.has_window else 0
    mark = stream.snapshot()
    for t in range(steps):
        if t == half:
            mark = stream.snapshot()
        outputs.append(attempt(stream.step, sequence[:, t], expected[:, t]))
        yield judge("stream", "reference", t + 1, outputs[-1], expected[:, t])
        if t < window:
            window_output = attempt(model, sequence[:, : t + 1], expected[:, t])
            yield judge("stream", "window graph", t + 1, outputs[-1], window_output)
    stream.restore(mark)
    last = min(steps, half + AGAIN)
    again = np.stack([attempt(stream.step, sequence[:, t], expected[:, t]) for t in range(half, last)])
    case, given = judge("stream", "snapshot", last, again, np.stack(outputs[half:last]))
    yield dataclasses.replace(case, limit=0.0), given


def _run_start(model: Model, judge: _Judge, expected: np.ndarray) -> Iterator[Trial]:
    """Frame by frame against the reference."""
    stream = model.stream(1)
    for t in range(judge.sequence.shape[1]):
        found = attempt(stream.step, judge.sequence[:, t], expected[:, t])
        yield judge("stream", "reference", t + 1, found, expected[:, t])


def _run_handovers(model: Model, judge: _Judge, expected: np.ndarray, handovers: tuple[int, ...]) -> Iterator[Trial]:
    """From a history, whole or in two pieces, then frame by frame."""
    for index, length in enumerate(handovers):
        stream, history = model.stream(1), judge.sequence[:, :length]
        if index % 2 and length > 1:
            attempt(stream.prefill, history[:, : length // 3 + 1], expected[:, 0])
            history = history[:, length // 3 + 1 :]
        found = attempt(stream.prefill, history, expected[:, length - 1])
        yield judge("prefill", "reference", length, found, expected[:, length - 1])
        for t in range(length, length + AFTER):
            found = attempt(stream.step, judge.sequence[:, t], expected[:, t])
            yield judge("stream", "after prefill", t + 1, found, expected[:, t])


def _run_batch(model: Model, judge: _Judge, expected: np.ndarray, fresh: np.ndarray) -> Iterator[Trial]:
    """Entries are independent: in whatever order they stand, and if one starts anew."""
    sequence, frames = judge.sequence, judge.sequence.shape[1]
    order = np.roll(np.arange(BATCH), 1)
    plain, permuted = model.stream(BATCH), model.stream(BATCH)
    for t in range(frames):
        found = attempt(plain.step, sequence[:, t], expected[:, t])
        yield judge("stream", "reference", t + 1, found, expected[:, t])
        permuted_output = attempt(permuted.step, sequence[order, t], expected[order, t])
        yield judge("stream", "permuted batch", t + 1, permuted_output, found[order])
    plain.reset()
    half = frames // 2
    for t in range(half):
        attempt(plain.step, sequence[:, t], expected[:, t])
    plain.reset([0])
    for t in range(half, frames):
        wanted = np.concatenate([fresh[:, t - half], expected[1:, t]])
        yield judge("stream", "reset entry", t + 1, attempt(plain.step, sequence[:, t], wanted), wanted, restart=half)


def _run_test_data(bundle: Bundle, model: Model, provider: str, tolerance: float) -> Iterator[Trial]:
    for graph in ("stream", "prefill"):
        session = model.session_of(graph)
        for folder, inputs, outputs in bundle.test_data(graph):
            try:
                found = session.run(list(outputs), inputs)
            except ORT_ERRORS as error:
                raise CheckError(
                    f"bundle {bundle.path}: ONNX Runtime failed on the test data in {folder}: {brief(error)}; "
                    "build the bundle again"
                ) from error
            frames, *_ = inputs.values()
            judge = _Judge(provider, tolerance, frames[:, None] if graph == "stream" else frames)
            cases = {
                name: judge(graph, folder, judge.sequence.shape[1], value, expected)[0]
                for value, (name, expected) in zip(found, outputs.items(), strict=True)
            }
            state = {name.removeprefix("past."): value for name, value in [*inputs.items()][1:]}
            yield max(cases.values(), key=lambda case: case.severity), Given(judge.sequence, state, outputs=cases)
    longer = bundle.test_sequence()
    if longer is not None:
        folder, frames, wanted = longer
        stream = model.stream(frames.shape[0])
        reached = [
            attempt(stream.step, frames[:, t], wanted[:, min(t, wanted.shape[1] - 1)]) for t in range(frames.shape[1])
        ]
        judge = _Judge(provider, tolerance, frames)
        yield judge("stream", folder, frames.shape[1], np.stack(reached, axis=1), wanted, whole=True)


def _sequence(bundle: Bundle, batch: int, frames: int) -> np.ndarray:
    width = int(bundle.manifest.graphs["stream"].inputs[0].shape[-1])
    return np.random.default_rng(batch).standard_normal((batch, frames, width)).astype(np.float32)


def _expected(reference: Any, sequence: np.ndarray) -> np.ndarray:
    """The reference's output at every frame of a stream, float64 [batch, sequence, hidden]."""
    import torch

    with torch.no_grad():
        result: np.ndarray = reference.forward_stream(torch.from_numpy(sequence).double()).numpy()
    return result
