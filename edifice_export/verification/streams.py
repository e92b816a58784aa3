"""Verification of a stream: frame by frame, from histories, in batches, and back to where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.manifest import ARCHITECTURE
from ..errors import CheckError, brief
from ..runtime.model import Model
from ..runtime.providers import ORT_ERRORS
from ..values import MAX_MAGNITUDE, Arrays, draw
from .report import LEAST, Given, Trial, attempt, compare

if TYPE_CHECKING:
    from .reference import Reference

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


def count_stream(bundle: Bundle, reference: Reference | None, every_frame: bool) -> int:
    """How many comparisons run_stream makes for each provider."""
    graphs = bundle.manifest.graphs
    sets = sum(len(graphs[name].test_data) for name in ("stream", "prefill") if name in graphs)
    sets += bundle.test_sequence() is not None
    if reference is None:
        return sets
    window = bundle.manifest.window_size
    plan = _Plan.of(window, every_frame)
    windows = min(plan.steps, window) if _same_as_window(bundle) else 0
    late = 0 if bundle.manifest.grows else plan.batch_frames - plan.batch_frames // 2
    handovers = len(plan.handovers) * (1 + AFTER) if "prefill" in graphs else 0
    starts = len(_magnitudes(bundle, reference)) * AFTER
    return sets + plan.steps + 1 + windows + handovers + starts + 2 * plan.batch_frames + late


def run_stream(
    bundle: Bundle, models: Mapping[str, Model], reference: Reference | None, every_frame: bool, tolerance: float
) -> Iterator[Iterator[Trial]]:
    """Every comparison of the stream and prefill graphs, as jobs that only run ONNX Runtime, see run_window.

    Args:
        bundle: with a stream.
        models: by provider.
        reference: what it is held to, or None to compare with the test data only.
        every_frame: follow the stream frame by frame even with a window above LONG_WINDOW.
        tolerance: see defaults.TOLERANCE.
    """
    for provider, model in models.items():
        yield _run_test_data(bundle, model, provider, tolerance)
    if reference is None:
        return
    plan = _Plan.of(bundle.manifest.window_size, every_frame)
    frames = _draw(bundle, 1, plan.frames)
    expected = reference.stream(frames)
    for provider, model in models.items():
        judge = _Judge(provider, tolerance, frames, floors=_floors(bundle, expected))
        yield _run_steps(model, judge, expected, plan.steps)
        if "prefill" in bundle.manifest.graphs:
            yield _run_handovers(model, judge, expected, plan.handovers)
    frames = _draw(bundle, BATCH, plan.batch_frames)
    expected = reference.stream(frames)
    fresh = reference.stream({name: array[:1, plan.batch_frames // 2 :] for name, array in frames.items()})
    for provider, model in models.items():
        judge = _Judge(provider, tolerance, frames, floors=_floors(bundle, expected))
        yield _run_batch(model, judge, expected, fresh)
    for magnitude in _magnitudes(bundle, reference):
        frames = _draw(bundle, 1, AFTER, magnitude)
        expected = reference.stream(frames)
        for provider, model in models.items():
            judge = _Judge(provider, tolerance, frames, magnitude, _floors(bundle, expected))
            yield _run_start(model, judge, expected)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Compares with what is expected after so many of these frames [batch, frames, ...] of every input."""

    provider: str
    tolerance: float
    frames: Arrays
    magnitude: float = 1.0
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """How many entries there are, and frames."""
        batch, frames = next(iter(self.frames.values())).shape[:2]
        return batch, frames

    def at(self, t: int | slice, order: Any = slice(None)) -> list[np.ndarray]:
        """A frame of every input, or several, of entries in an order."""
        return [array[order, t] for array in self.frames.values()]

    def __call__(self, graph: str, source: str, length: int, found: Arrays, expected: Arrays, **given: Any) -> Trial:
        """A comparison of every output after so many frames; **given are the fields of Given but for the inputs."""
        batch, _ = self.shape
        cases = {
            name: compare(
                found[name],
                value.astype(np.float64),
                self.tolerance,
                floor=self.floors.get(name, 1.0),
                graph=graph,
                provider=self.provider,
                source=source,
                batch=batch,
                length=length,
                seed=batch,
                magnitude=self.magnitude,
            )
            for name, value in expected.items()
        }
        inputs = {name: array[:, :length] for name, array in self.frames.items()}
        return max(cases.values(), key=lambda case: case.severity), Given(inputs, outputs=cases, **given)


def _at(outputs: Arrays, t: int | slice, order: Any = slice(None)) -> Arrays:
    """Outputs at a frame, of entries in an order."""
    return {name: array[order, t] for name, array in outputs.items()}


def _run_steps(model: Model, judge: _Judge, expected: Arrays, steps: int) -> Iterator[Trial]:
    """Frame by frame against the reference and, within the window, the window graph; then again from a snapshot."""
    stream, outputs = model.stream(1), []
    half, window = steps // 2, model.window_size if _same_as_window(model.bundle) else 0
    mark = stream.snapshot()
    for t in range(steps):
        if t == half:
            mark = stream.snapshot()
        wanted = _at(expected, t)
        outputs.append(attempt(stream.step, judge.at(t), wanted))
        yield judge("stream", "reference", t + 1, outputs[-1], wanted)
        if t < window:
            window_output = attempt(model, judge.at(slice(t + 1)), wanted)
            yield judge("stream", "window graph", t + 1, outputs[-1], window_output)
    stream.restore(mark)
    last = min(steps, half + AGAIN)
    again = [attempt(stream.step, judge.at(t), _at(expected, t)) for t in range(half, last)]
    before = outputs[half:last]
    found, wanted = ({name: np.stack([each[name] for each in run]) for name in expected} for run in (again, before))
    case, given = judge("stream", "snapshot", last, found, wanted)
    yield dataclasses.replace(case, limit=0.0), dataclasses.replace(given, outputs={})


def _run_start(model: Model, judge: _Judge, expected: Arrays) -> Iterator[Trial]:
    """Frame by frame against the reference."""
    stream = model.stream(1)
    for t in range(judge.shape[1]):
        wanted = _at(expected, t)
        yield judge("stream", "reference", t + 1, attempt(stream.step, judge.at(t), wanted), wanted)


def _run_handovers(model: Model, judge: _Judge, expected: Arrays, handovers: tuple[int, ...]) -> Iterator[Trial]:
    """From a history, whole or in two pieces, then frame by frame."""
    for index, length in enumerate(handovers):
        stream, start = model.stream(1), 0
        if index % 2 and length > 1:
            start = length // 3 + 1
            attempt(stream.prefill, judge.at(slice(start)), _at(expected, 0))
        wanted = _at(expected, length - 1)
        found = attempt(stream.prefill, judge.at(slice(start, length)), wanted)
        yield judge("prefill", "reference", length, found, wanted)
        for t in range(length, length + AFTER):
            found = attempt(stream.step, judge.at(t), _at(expected, t))
            yield judge("stream", "after prefill", t + 1, found, _at(expected, t))


def _run_batch(model: Model, judge: _Judge, expected: Arrays, fresh: Arrays) -> Iterator[Trial]:
    """Entries are independent: in whatever order they stand, and if one starts anew where one can."""
    frames = judge.shape[1]
    order = np.roll(np.arange(BATCH), 1)
    plain, permuted = model.stream(BATCH), model.stream(BATCH)
    for t in range(frames):
        found = attempt(plain.step, judge.at(t), _at(expected, t))
        yield judge("stream", "reference", t + 1, found, _at(expected, t))
        permuted_output = attempt(permuted.step, judge.at(t, order), _at(expected, t, order))
        again = {name: value[order] for name, value in found.items()}
        yield judge("stream", "permuted batch", t + 1, permuted_output, again)
    if model.bundle.manifest.grows:
        return  # what has grown is as long for all of them
    plain.reset()
    half = frames // 2
    for t in range(half):
        attempt(plain.step, judge.at(t), _at(expected, t))
    plain.reset([0])
    for t in range(half, frames):
        wanted = {name: np.concatenate([fresh[name][:, t - half], value[1:, t]]) for name, value in expected.items()}
        found = attempt(plain.step, judge.at(t), wanted)
        yield judge("stream", "reset entry", t + 1, found, wanted, restart=half)


def _run_test_data(bundle: Bundle, model: Model, provider: str, tolerance: float) -> Iterator[Trial]:
    manifest = bundle.manifest
    own = [spec.name for spec in manifest.own_tensors("stream")[0]]
    for graph in [name for name in ("stream", "prefill") if name in manifest.graphs]:
        session = model.session_of(graph)
        names = [spec.name for spec in manifest.own_tensors(graph)[0]]
        for folder, inputs, outputs in bundle.test_data(graph):
            try:
                found = session.run(list(outputs), inputs)
            except ORT_ERRORS as error:
                raise CheckError(
                    f"bundle {bundle.path}: ONNX Runtime failed on the test data in {folder}: {brief(error)}; "
                    "build the bundle again"
                ) from error
            frames = {name: inputs[name][:, None] if graph == "stream" else inputs[name] for name in names}
            judge = _Judge(provider, tolerance, frames, floors=_floors(bundle, outputs))
            state = {name.removeprefix("past."): inputs[name] for name in inputs.keys() - set(names)}
            given = dict(zip(outputs, found, strict=True))
            yield judge(graph, folder, judge.shape[1], given, outputs, state=state)
    longer = bundle.test_sequence()
    if longer is not None:
        folder, frames, wanted = longer
        given = dict(zip(own, frames.values(), strict=True))
        judge = _Judge(provider, tolerance, given, floors=_floors(bundle, wanted))
        batch, length = judge.shape
        stream = model.stream(batch)
        last = {name: value.shape[1] - 1 for name, value in wanted.items()}
        reached = [
            attempt(stream.step, judge.at(t), {name: value[:, min(t, last[name])] for name, value in wanted.items()})
            for t in range(length)
        ]
        found_at = {name: np.stack([each[name] for each in reached], axis=1) for name in wanted}
        yield judge("stream", folder, length, found_at, wanted, whole=True)


def _draw(bundle: Bundle, batch: int, frames: int, magnitude: float = 1.0) -> Arrays:
    """Random frames of every input of a stream."""
    generator = np.random.default_rng(batch)
    drawn = {}
    for spec in bundle.manifest.own_tensors("stream")[0]:
        array = draw(spec.framed(frames, batch), {}, generator)
        if spec.values.kind == "normal":
            limit = min(MAX_MAGNITUDE, float(np.finfo(spec.dtype).max))
            array = (array * np.dtype(spec.dtype).type(magnitude)).clip(-limit, limit)
        drawn[spec.name] = array
    return drawn


def _floors(bundle: Bundle, expected: Arrays) -> dict[str, float]:
    """Of a module's outputs, the largest of a whole stream: one of its frames may be near zero."""
    if bundle.manifest.program.kind == ARCHITECTURE:
        return {}
    largest = {name: float(np.abs(value.astype(np.float64)).max(initial=0)) for name, value in expected.items()}
    return {name: max(size, LEAST) for name, size in largest.items()}


def _magnitudes(bundle: Bundle, reference: Reference) -> list[float]:
    """Of frames that may be any numbers. All of them are for architectures to bear, and for modules that can."""
    if not any(spec.values.kind == "normal" for spec in bundle.manifest.own_tensors("stream")[0]):
        return []
    return [magnitude for magnitude in MAGNITUDES if reference.bears(_draw(bundle, 1, AFTER, magnitude))]


def _same_as_window(bundle: Bundle) -> bool:
    """Whether the window graph gives what the stream gives at the last frame, as those of architectures do."""
    manifest = bundle.manifest
    return "window" in manifest.graphs and manifest.program.kind == ARCHITECTURE
