"""Run: a recording of any length through a bundle, window by window or frame by frame, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..arguments import whole_number
from ..errors import NotFiniteError, RequestError
from ..writing.files import is_within, same_file
from .csv_recording import CsvLines
from .model import Model
from .recording import check_room, iter_windows, open_output, open_recording, window_starts
from .tensor_file import check_tensor_output, read_tensors, write_tensors

__all__ = ["CallReport", "RunReport", "StreamReport", "run_recording", "run_tensors", "stream_recording"]

_CHUNK_BYTES = 2**24
"""Input bytes that one call of the runtime takes at most, unless one window is larger."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What was run.

    Attributes:
        shape: of the output that was written.
        windows: how many windows were run, all batch entries together.
        window: frames in each of them.
        stride: frames from one window to the next.
        unused_frames: frames at the end of each entry that fill no further window.
        providers: nodes run by each provider, by short name.
        passed_over: providers that were preferred and are not usable, and why.
        lines: which lines of a .csv were taken as what; None of other files.
    """

    output: str
    shape: list[int]
    windows: int
    window: int
    stride: int
    unused_frames: int
    providers: dict[str, int]
    passed_over: dict[str, str]
    lines: CsvLines | None


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What was streamed.

    Attributes:
        shape: of the output that was written.
        frames: how many frames each stream had.
        batch: how many streams there were, side by side.
        providers: that run nodes of the graph, by short name, and how many each.
        passed_over: providers that were preferred and are not usable, and why.
        lines: which lines of a .csv were taken as what; None of other files.
    """

    output: str
    shape: list[int]
    frames: int
    batch: int
    providers: dict[str, int]
    passed_over: dict[str, str]
    lines: CsvLines | None


@dataclasses.dataclass(frozen=True)
class CallReport:
    """What a bundle of somebody's module was run on.

    Attributes:
        output: the file that was written.
        shapes: of the outputs, by name.
        frames: how many frames the stream had; None of a single call.
        providers: that run nodes of the graph, by short name, and how many each.
        passed_over: providers that were preferred and are not usable, and why.
    """

    output: str
    shapes: dict[str, list[int]]
    frames: int | None
    providers: dict[str, int]
    passed_over: dict[str, str]


def run_tensors(
    model: Model,
    source: Path,
    target: Path,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CallReport:
    """Runs a bundle of somebody's module on the tensors of a file: once, or frame by frame.

    Args:
        model: see load.
        source: .npz with an array for each input, or .npy of the only one. For a stream they have the axis of frames
            after that of the batch.
        target: .npz for the outputs by name, or .npy of the only one; of a stream with the axis of frames.
        stream: whether it goes frame by frame.
        progress: called with the number of frames done and of all.

    Raises:
        RequestError: a file can't be read or written, or holds other tensors than the model takes.
        CheckError: ONNX Runtime could not run it, or an output is not finite.

    Nothing is written then.
    """
    _check_target(model, source, target)
    if not stream:
        check_tensor_output(target, [spec.name for spec in model.outputs])
        outputs = model.run(read_tensors(source, [spec.name for spec in model.inputs]))
        frames, placed = None, model.placement
        if progress is not None:
            progress(1, 1)
    else:
        outputs, frames, placed = _stream_tensors(model, source, target, progress)
    write_tensors(target, outputs)
    shapes = {name: list(array.shape) for name, array in outputs.items()}
    return CallReport(str(target), shapes, frames, placed, model.passed_over)


def _stream_tensors(
    model: Model, source: Path, target: Path, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, np.ndarray], int, dict[str, int]]:
    model.check_stream()
    inputs, specs = model.bundle.manifest.own_tensors("stream")
    check_tensor_output(target, [spec.name for spec in specs])
    arrays = [*read_tensors(source, [spec.name for spec in inputs]).values()]
    sizes = {array.shape[:2] for array in arrays}
    if any(array.ndim != len(spec.shape) + 1 for array, spec in zip(arrays, inputs, strict=True)) or len(sizes) > 1:
        wanted = ", ".join(f"{spec.name} [batch, frames, ...]" for spec in inputs)
        found = ", ".join(str(list(array.shape)) for array in arrays)
        raise RequestError(f"{source}: a stream takes {wanted}, with as many frames of each; it holds {found}")
    batch, length = sizes.pop()
    stream, found_at = model.stream(batch, history=0), []
    for t in range(length):
        try:
            found = stream.step(*(np.ascontiguousarray(array[:, t]) for array in arrays))
        except (RequestError, NotFiniteError) as error:
            raise type(error)(f"{source}, frame {t}: {error}") from error
        found_at.append(found if isinstance(found, tuple) else (found,))
        if progress is not None:
            progress(t + 1, length)
    stacked = (np.stack(each, axis=1) for each in zip(*found_at, strict=True))
    return {spec.name: array for spec, array in zip(specs, stacked, strict=True)}, length, stream.placement


def run_recording(
    model: Model, source: Path, target: Path, stride: int = 1, progress: Callable[[int, int], None] | None = None
) -> RunReport:
    """Runs a recording and writes the output of every window.

    A recording no longer than the model's window is one window. A longer one becomes sliding windows: the first ends
    at frame `window_size`, each further one `stride` frames later.

    Args:
        model: see load.
        source: .npy, .npz or .csv of float32 [sequence, embed_dim] or [batch, sequence, embed_dim].
        target: .npy file for float32 [hidden_size] or [batch, hidden_size], or with sliding windows
            [windows, hidden_size] or [batch, windows, hidden_size].
        stride: frames from one window to the next.
        progress: called with the number of windows done and of all.

    Raises:
        RequestError: the recording can't be read, has another width or dtype, or holds a NaN or a number beyond
            MAX_MAGNITUDE; the target can't be written.
        CheckError: ONNX Runtime could not run it, or an output is not finite.

    Nothing is written then.
    """
    _check_target(model, source, target)
    stride, hidden = whole_number("stride", stride, 1), model.outputs[0].width

    def admit(shape: tuple[int, ...]) -> None:
        windows = len(window_starts(shape[-2], model.window_size, stride))
        check_room(target, (*shape[:-2], windows, hidden))

    with open_recording(source, model.inputs[0].width, model.inputs[0].name, admit) as recording:
        batch, length, width = recording.frames.shape
        starts = window_starts(length, model.window_size, stride)
        window = min(length, model.window_size)
        shape = [batch] if recording.batched else []
        shape += [len(starts)] if length > model.window_size else []
        shape.append(hidden)
        total, done = batch * len(starts), 0
        chunk = max(1, _CHUNK_BYTES // (4 * window * width))
        with open_output(target, tuple(shape)) as output:
            flat = output.reshape(total, hidden)
            for windows in iter_windows(recording.frames, window, stride, chunk):
                try:
                    flat[done : done + len(windows)] = model(windows)
                except NotFiniteError as error:
                    entry, turn = divmod(done + error.entry, len(starts))
                    place = f"frames {starts[turn]} to {starts[turn] + window - 1} of recording {entry}"
                    raise NotFiniteError(f"{source}, {place}: {error}") from error
                done += len(windows)
                if progress is not None:
                    progress(done, total)
    return RunReport(
        output=str(target),
        shape=shape,
        windows=total,
        window=window,
        stride=stride,
        unused_frames=length - (starts[-1] + window),
        providers=model.placement,
        passed_over=model.passed_over,
        lines=recording.lines,
    )


def stream_recording(
    model: Model, source: Path, target: Path, stride: int = 1, progress: Callable[[int, int], None] | None = None
) -> StreamReport:
    """Feeds a recording to a bundle's stream, frame by frame, and writes the output at every frame.

    Args:
        model: see load.
        source: .npy, .npz or .csv of float32 [sequence, embed_dim] or [batch, sequence, embed_dim]; the entries of a
            batch are streams of their own.
        target: .npy file for float32 [sequence, hidden_size] or [batch, sequence, hidden_size].
        stride: 1; a stream sees every frame.
        progress: called with the number of frames done and of all.

    Raises:
        RequestError: the bundle has no stream, the recording can't be read, has another width or dtype, or holds a
            NaN or a number beyond MAX_MAGNITUDE; the target can't be written.
        CheckError: ONNX Runtime could not run it, or an output is not finite.

    Nothing is written then.
    """
    if whole_number("stride", stride, 1) != 1:
        raise RequestError(f"--stride {stride}: a stream sees every frame; leave it out, or leave --stream out")
    _check_target(model, source, target)
    hidden, stream = model.outputs[0].width, None

    def admit(shape: tuple[int, ...]) -> None:
        nonlocal stream
        stream = model.stream(shape[0] if len(shape) == 3 else 1, history=0)
        check_room(target, (*shape[:-1], hidden))

    with open_recording(source, model.inputs[0].width, model.inputs[0].name, admit) as recording:
        batch, length, _ = recording.frames.shape
        stream = stream or model.stream(batch, history=0)
        shape = (batch, length, hidden)
        with open_output(target, shape if recording.batched else shape[1:]) as output:
            outputs = output.reshape(shape)
            for t in range(length):
                try:
                    outputs[:, t] = stream.step(np.ascontiguousarray(recording.frames[:, t]))
                except (RequestError, NotFiniteError) as error:
                    raise type(error)(f"{source}, frame {t}: {error}") from error
                if progress is not None:
                    progress(t + 1, length)
    return StreamReport(
        output=str(target),
        shape=list(shape if recording.batched else shape[1:]),
        frames=length,
        batch=batch,
        providers=stream.placement,
        passed_over=model.passed_over,
        lines=recording.lines,
    )


def _check_target(model: Model, source: Path, target: Path) -> None:
    if same_file(source, target):
        raise RequestError(f"--output {target}: is the input, {source}; name another file")
    if is_within(target, model.bundle.path):
        raise RequestError(
            f"--output {target}: is inside the bundle, which holds its own files only; name another place"
        )
