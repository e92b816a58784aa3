"""Streams: every step is what the whole past says, wrong frames change nothing, threads do not meet."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import any_architecture
from stream_helpers import HIDDEN, WIDTH, WINDOW, agrees, contents, expected, frames, same, steps

import edifice_export as ee
from edifice_export.runtime import providers
from edifice_export.runtime import stream as stream_module
from edifice_export.runtime.providers import device_of
from edifice_export.specification import InputSpec, OutputSpec, shape_of


@pytest.fixture(scope="module")
def model(bundle: ee.Bundle) -> ee.Model:
    return ee.load(bundle, threads=1)


# What a step gives


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_gives_what_the_window_that_ends_there_gives(model: ee.Model, batch: int) -> None:
    sequence = frames(batch, WINDOW)
    found = steps(model.stream(batch), sequence)
    for length in range(1, WINDOW + 1):
        assert agrees(found[:, length - 1], model(sequence[:, :length])), length


@pytest.mark.parametrize("batch", [1, 3])
def test_beyond_the_window_a_step_gives_what_the_reference_says(model: ee.Model, batch: int) -> None:
    sequence = frames(batch, 5 * WINDOW, seed=1)
    assert agrees(steps(model.stream(batch), sequence), expected(model.bundle, sequence))


def test_a_stream_says_what_it_is(model: ee.Model) -> None:
    stream = model.stream(3, history=5)
    assert stream.inputs == (InputSpec("frame", "float32", shape_of("batch", WIDTH)),)
    assert stream.outputs == (OutputSpec("output", "float32", shape_of("batch", HIDDEN), "last"),)
    assert (stream.batch, stream.history, stream.rewindable) == (3, 5, 0)
    assert stream.placement["cpu"] > 10
    found = stream.step(frames(3))
    assert (found.dtype, found.shape) == (np.dtype(np.float32), (3, HIDDEN))
    assert stream.rewindable == 1


def test_a_single_stream_takes_frames_without_a_batch(model: ee.Model) -> None:
    sequence = frames(1, 6)
    with_batch, without = model.stream(), model.stream()
    np.testing.assert_array_equal(without.prefill(sequence[0, :3]), with_batch.prefill(sequence[:, :3])[0])
    for t in range(3, 6):
        found = without.step(sequence[0, t])
        assert found.shape == (HIDDEN,)
        np.testing.assert_array_equal(found, with_batch.step(sequence[:, t])[0])


def test_what_was_given_and_what_was_got_are_the_callers_own(model: ee.Model) -> None:
    sequence, stream, plain = frames(2, 8), model.stream(2), model.stream(2)
    wanted, got = steps(plain, sequence), []
    for t in range(8):
        given = sequence[:, t].copy()
        got.append(stream.step(given) if t != 4 else stream.prefill(given[:, None]))
        given[:] = np.nan
    assert agrees(np.stack(got, axis=1), wanted)
    kept = [output.copy() for output in got]
    got[0][:] = np.nan
    stream.step(sequence[:, 0])
    assert all(np.array_equal(output, before) for output, before in zip(got[1:], kept[1:], strict=True))


def test_a_view_of_an_array_gives_what_a_copy_gives(model: ee.Model) -> None:
    wide = frames(5, 4, 2, seed=3)[::2, :, 1].transpose(1, 0, 2)
    assert not wide.flags.c_contiguous
    one, other = model.stream(4), model.stream(4)
    np.testing.assert_array_equal(one.prefill(wide), other.prefill(wide.copy()))
    np.testing.assert_array_equal(one.step(wide[:, 0]), other.step(wide[:, 0].copy()))


# Histories


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_history_at_once_is_the_history_frame_by_frame(model: ee.Model, length: int, pieces: int) -> None:
    sequence = frames(2, length + 3, seed=length)
    slow, quick = model.stream(2), model.stream(2)
    wanted = steps(slow, sequence[:, :length])[:, -1]
    cut = length // 3 + 1 if pieces == 2 and length > 1 else 0
    if cut:
        quick.prefill(sequence[:, :cut])
    assert agrees(quick.prefill(sequence[:, cut:length]), wanted)
    found, also = contents(quick), contents(slow)
    assert found.keys() == also.keys()
    assert all(agrees(found[name], also[name]) for name in found)
    assert agrees(steps(quick, sequence[:, length:]), expected(model.bundle, sequence)[:, length:])


def test_a_long_history_is_handed_over_in_pieces(model: ee.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = frames(2, 4 * WINDOW)
    whole = model.stream(2)
    output = whole.prefill(sequence)
    lengths = []
    monkeypatch.setattr(stream_module, "_PIECE", 3)
    stream = model.stream(2)
    real = stream._run_prefill

    def run(pieces: list[np.ndarray], state: Any) -> Any:
        lengths.extend(piece.shape[1] for piece in pieces)
        return real(pieces, state)

    monkeypatch.setattr(stream, "_run_prefill", run)
    assert agrees(stream.prefill(sequence[:, :-4]), expected(model.bundle, sequence)[:, -5])
    assert lengths == [WINDOW, WINDOW, WINDOW, WINDOW - 4]
    assert stream.rewindable == 1
    assert agrees(steps(stream, sequence[:, -4:])[:, -1], output)


# What is refused


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (frames(2)[:, :-1], r"expected frame float32 \[batch, 6\] or \[6\], got shape \[2, 5\]"),
        (frames(1, 2), r"\[1, 2, 6\]"),
        (frames(), "a batch of 1, and the stream one of 2"),
        (frames(3), "a batch of 3, and the stream one of 2"),
        (frames(0), "holds nothing"),
        (np.array(1, np.float32), r"got shape \[\]"),
        (np.float32(1), "should be a numpy array"),
        (frames(2).astype(np.float64), "float64; convert it"),
        (frames(2).astype(np.float16), "float16; convert it"),
        (frames(2).astype(np.int64), "int64; convert it"),
        (frames(2).astype(">f4"), ">f4; convert it"),
        (np.where(np.arange(WIDTH) == 4, np.float32("nan"), frames(2)), r"nan at \[0, 4\]"),
        (np.where(np.arange(2)[:, None] == 1, np.float32("inf"), frames(2)), r"inf at \[1, 0\]"),
        ([[0.0] * WIDTH] * 2, "list"),
        (None, "NoneType"),
        (torch.zeros(2, WIDTH), "Tensor"),
    ],
)
@any_architecture
def test_wrong_frames_are_refused_by_name_and_leave_the_stream_as_it_was(
    model: ee.Model, frame: Any, says: str
) -> None:
    stream = model.stream(2)
    steps(stream, frames(2, 3))
    before = contents(stream)
    with pytest.raises(ee.RequestError, match=says) as caught:
        stream.step(frame)
    assert "frame" in str(caught.value)
    assert same(contents(stream), before)
    assert stream.rewindable == 3


@pytest.mark.parametrize(
    ("sequence", "says"),
    [
        (frames(2, 4)[..., :-1], r"\[2, 4, 5\]"),
        (frames(4), "a batch of 1, and the stream one of 2"),
        (frames(3, 4), "a batch of 3, and the stream one of 2"),
        (frames(2, 0), "holds nothing"),
        (frames(2, 4).astype(np.float64), "float64"),
        (np.where(np.arange(4)[:, None] == 3, np.float32("nan"), frames(2, 4)), r"nan at \[0, 3, 0\]"),
        (np.where(np.arange(4)[:, None] == 1, np.float32("-inf"), frames(2, 4)), r"-inf at \[0, 1, 0\]"),
        ([], "list"),
    ],
)
@any_architecture
def test_wrong_histories_are_refused_by_name_and_leave_the_stream_as_it_was(
    model: ee.Model, sequence: Any, says: str
) -> None:
    stream = model.stream(2)
    steps(stream, frames(2, 3))
    before = contents(stream)
    with pytest.raises(ee.RequestError, match=says) as caught:
        stream.prefill(sequence)
    assert "state_sequence" in str(caught.value)
    assert same(contents(stream), before)
    assert stream.rewindable == 3


@pytest.mark.parametrize(
    "settings",
    [
        *({"batch": value} for value in (0, -1, 1.5, True, np.True_, "2", None, np.float32(2))),
        *({"history": value} for value in (-1, 100_001, 1.5, True, None)),
    ],
)
@any_architecture
def test_wrong_settings_are_refused(model: ee.Model, settings: dict[str, Any]) -> None:
    with pytest.raises(ee.RequestError, match=f"{next(iter(settings))} must be an integer from"):
        model.stream(**settings)


class Failing:
    """A session that does its work, overwriting what it was given to write to, and then fails."""

    def __init__(self, session: Any, error: Exception, after: int = 0) -> None:
        self.session, self.error, self.after = session, error, after

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding)
        self.after -= 1
        if self.after < 0:
            raise self.error


@pytest.mark.parametrize("error", [providers._state.EPFail("out of memory"), RuntimeError("out of memory")])
def test_a_failure_of_onnxruntime_leaves_the_stream_as_it_was(
    model: ee.Model, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence, stream, plain = frames(2, 12), model.stream(2), model.stream(2)
    wanted = steps(plain, sequence)
    found = steps(stream, sequence[:, :8])
    before = contents(stream)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_step", Failing(stream._step, error))
        with pytest.raises(ee.CheckError, match=r"failed on a frame of 2 streams: .*out of memory"):
            stream.step(sequence[:, 8])
        patch.setattr(stream_module, "_PIECE", 1)
        patch.setattr(stream, "_prefill", Failing(stream._prefill, error, after=1))
        with pytest.raises(ee.CheckError, match=r"failed on state_sequence \[2, 5, 6\]: .*out of memory"):
            stream.prefill(sequence)
    assert same(contents(stream), before)
    assert stream.rewindable == 8
    np.testing.assert_array_equal(np.concatenate([found, steps(stream, sequence[:, 8:])], axis=1), wanted)


# Threads and devices


def test_streams_in_many_threads_give_what_they_give_alone(bundle: ee.Bundle) -> None:
    model = ee.load(bundle, threads=1)
    batches = (1, 2, 3, 1, 2, 3, 1, 2)
    sequences = [frames(batch, 60, seed=index) for index, batch in enumerate(batches)]

    def play(stream: ee.Stream, sequence: np.ndarray) -> Iterator[np.ndarray]:
        """One frame, some of them again, histories, and a reset now and then."""
        for t in range(sequence.shape[1]):
            yield stream.step(sequence[:, t])
            if t % 9 == 8:
                stream.rewind(3)
                yield stream.prefill(sequence[:, t - 2 : t + 1])
            if t % 25 == 24:
                stream.reset([0])

    alone = [list(play(model.stream(len(sequence)), sequence)) for sequence in sequences]
    # A new model: opening its sessions is a matter of all threads too.
    shared, found = ee.load(bundle, threads=1), {}
    ready = threading.Barrier(4)

    def work(thread: int) -> None:
        ready.wait()
        mine = [thread, thread + 4]
        players = [play(shared.stream(batches[index]), sequences[index]) for index in mine]
        outputs = list(itertools.zip_longest(*players))
        for place, index in enumerate(mine):
            found[index] = [turn[place] for turn in outputs if turn[place] is not None]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for index, wanted in enumerate(alone):
        assert len(found[index]) == len(wanted)
        assert all(np.array_equal(one, other) for one, other in zip(found[index], wanted, strict=True))


@pytest.mark.parametrize(
    ("names", "device"),
    [
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
        (["DmlExecutionProvider", "CPUExecutionProvider"], "dml"),
        (["CPUExecutionProvider"], "cpu"),
        (["OpenVINOExecutionProvider", "CPUExecutionProvider"], "cpu"),
        (["WebGpuExecutionProvider", "CPUExecutionProvider"], "cpu"),
        (["CoreMLExecutionProvider", "CPUExecutionProvider"], "cpu"),
    ],
)
def test_the_state_is_where_the_first_provider_computes(names: list[str], device: str) -> None:
    assert device_of(SimpleNamespace(get_providers=lambda: names)) == device


class Recorded:
    """A binding that notes what is bound to it and when it runs."""

    def __init__(self, binding: Any, log: list[tuple[str, str]]) -> None:
        self.binding, self.log = binding, log

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.log.append(("input", name))
        self.binding.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.log.append(("output", name))
        self.binding.bind_ortvalue_output(name, value)

    def synchronize_outputs(self) -> None:
        self.log.append(("synchronize", ""))
        self.binding.synchronize_outputs()


class RecordedSession:
    """A session whose bindings are recorded, and that says it has this provider."""

    def __init__(self, session: Any, provider: str) -> None:
        self.session, self.provider, self.log = session, provider, []

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def io_binding(self) -> Recorded:
        return Recorded(self.session.io_binding(), self.log)

    def run_with_iobinding(self, binding: Recorded) -> None:
        self.log.append(("run", ""))
        self.session.run_with_iobinding(binding.binding)


@pytest.mark.parametrize(
    ("provider", "device"),
    [
        ("CPUExecutionProvider", "cpu"),
        ("OpenVINOExecutionProvider", "cpu"),
        ("CUDAExecutionProvider", "cuda"),
        ("DmlExecutionProvider", "dml"),
    ],
)
@any_architecture
def test_a_frame_is_bound_anew_for_providers_that_take_a_copy(
    model: ee.Model, provider: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has none: what would be allocated there is here, and what is bound is noted."""
    asked = []

    def allocate(shape: list[int], dtype: Any, where: str) -> ort.OrtValue:
        asked.append(where)
        return ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7, dtype))

    monkeypatch.setattr(stream_module.ort.OrtValue, "ortvalue_from_shape_and_type", allocate)
    session = RecordedSession(model.session_of("stream"), provider)
    stream = ee.Stream(model.bundle, session, model.session_of("prefill"), 2, 3)
    sequence = frames(2, 20)
    assert agrees(steps(stream, sequence), expected(model.bundle, sequence))
    assert set(asked) == ({device} if device != "cpu" else set())
    log = [kind for kind, name in session.log if name in ("frame", "")]
    # On the CPU the last steps use bindings that were made before.
    in_place = provider == "CPUExecutionProvider"
    last = ["run", "synchronize"] if in_place else ["input", "run", "synchronize"]
    assert log[-3 * len(last) :] == 3 * last
    assert log.count("run") == log.count("synchronize") == 20
    monkeypatch.undo()
    if device != "cpu":
        with pytest.raises(ee.RequestError, match=f"on {device}"):
            model.stream(2).restore(stream.snapshot())
