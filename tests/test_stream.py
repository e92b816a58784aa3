"""Streams: every step is what the whole past says, from wherever it was reached, and going back is exact."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import TINY, any_architecture, tiny_bundle
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from stream_helpers import HIDDEN, WIDTH, WINDOW, agrees, contents, expected, frames, reference, same, steps

import edifice_export as ee
from edifice_export.manifest import FileEntry
from edifice_export.runtime import providers
from edifice_export.runtime import stream as stream_module
from edifice_export.runtime.providers import device_of
from edifice_export.specification import TensorSpec
from edifice_reference.layers import initialize as initialize_weights
from edifice_reference.registry import ARCHITECTURES


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
    assert stream.frame == TensorSpec("frame", "float32", ("batch", WIDTH))
    assert stream.output == TensorSpec("output", "float32", ("batch", HIDDEN))
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

    def run(piece: np.ndarray, state: Any) -> Any:
        lengths.append(piece.shape[1])
        return real(piece, state)

    monkeypatch.setattr(stream, "_run_prefill", run)
    assert agrees(stream.prefill(sequence[:, :-4]), expected(model.bundle, sequence)[:, -5])
    assert lengths == [WINDOW, WINDOW, WINDOW, WINDOW - 4]
    assert stream.rewindable == 1
    assert agrees(steps(stream, sequence[:, -4:])[:, -1], output)


# Going back


def test_after_a_restore_the_same_frames_give_bitwise_the_same(model: ee.Model) -> None:
    sequence = frames(2, 3 * WINDOW)
    stream = model.stream(2)
    steps(stream, sequence[:, :5])
    mark, before = stream.snapshot(), contents(stream)
    first = steps(stream, sequence[:, 5:])
    for _ in range(2):
        stream.restore(mark)
        assert same(contents(stream), before)
        np.testing.assert_array_equal(steps(stream, sequence[:, 5:]), first)
    # With other frames in between, and however they came in.
    stream.restore(mark)
    stream.prefill(frames(2, 11, seed=9))
    stream.restore(mark)
    np.testing.assert_array_equal(steps(stream, sequence[:, 5:]), first)


def test_snapshots_stay_as_they_were_taken(model: ee.Model) -> None:
    """Nothing is written in place, whatever happens to the stream and however many are held."""
    sequence, stream = frames(2, 40), model.stream(2)
    held = []
    for t in range(40):
        held.append((stream.snapshot(), contents(stream), stream.step(sequence[:, t])))
        if t % 7 == 6:
            stream.rewind(3)
        if t % 10 == 9:
            stream.prefill(sequence[:, :5])
        if t % 15 == 14:
            stream.reset([1])
    for snapshot, before, _ in held:
        assert same(contents(stream, snapshot), before)
    for t, (snapshot, before, output) in enumerate(held):
        stream.restore(snapshot)
        np.testing.assert_array_equal(stream.step(sequence[:, t]), output)
        assert same(contents(stream, snapshot), before)


def test_buffers_of_dropped_snapshots_are_used_again(model: ee.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, allocated = model.stream(history=4), []
    real = stream._allocate
    monkeypatch.setattr(stream, "_allocate", lambda state: allocated.append(state) or real(state))
    random, sequence = np.random.default_rng(0), frames(100)
    held: deque[ee.Snapshot] = deque(maxlen=5)
    for t in range(10_000):
        if random.random() < 0.4:
            held.append(stream.snapshot())
        if random.random() < 0.05:
            stream.restore(held[random.integers(len(held))]) if held else stream.reset()
        if random.random() < 0.02:
            stream.rewind(min(2, stream.rewindable))
        stream.step(sequence[t % 100])
    sets = len(allocated) / len(model.bundle.manifest.states)
    # Those of the history, the current one, the one that is written, the snapshots.
    assert sets <= 4 + 2 + 5
    assert len(stream._bindings) <= (sets + 1) ** 2


def test_bindings_are_bounded_however_many_snapshots_there_were(
    model: ee.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_MAX_BINDINGS", 10)
    sequence, stream = frames(1, 60), model.stream()
    held, found = [], []
    for t in range(60):
        found.append(stream.step(sequence[:, t]))
        held.append(stream.snapshot())
        assert len(stream._bindings) <= 10
    assert agrees(np.stack(found, axis=1), expected(model.bundle, sequence))


def test_a_snapshot_goes_into_another_stream_of_its_bundle(model: ee.Model) -> None:
    sequence = frames(2, 12)
    one, elsewhere = model.stream(2), ee.load(model.bundle.path, threads=1).stream(2, history=0)
    steps(one, sequence[:, :4])
    mark, before = one.snapshot(), contents(one)
    elsewhere.step(frames(2, seed=5))
    elsewhere.restore(mark)
    np.testing.assert_array_equal(steps(elsewhere, sequence[:, 4:]), steps(one, sequence[:, 4:]))
    assert elsewhere.rewindable == 0
    # They share its buffers, and neither writes to them, even when one of the streams is gone.
    del one
    steps(elsewhere, sequence)
    assert same(contents(elsewhere, mark), before)


def with_other_weights(bundle: ee.Bundle) -> ee.Bundle:
    """The bundle, as it would be if its weights were others."""
    files = {**bundle.manifest.files, bundle.manifest.reference: FileEntry(1, "0" * 64)}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))


def test_snapshots_of_anything_else_are_refused(model: ee.Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    stream = model.stream(2)
    stream.step(frames(2))
    before, rewindable = contents(stream), stream.rewindable
    names = iter(ARCHITECTURES)
    other = next(name for name in names if name != model.bundle.manifest.architecture)
    for wrong, says in (
        (ee.load(tiny_bundle(other, tmp_path_factory)).stream(2), f"the snapshot is of {other} with weights"),
        (ee.load(with_other_weights(model.bundle)).stream(2), "with weights 000000000000, batch 2, on cpu"),
        (model.stream(3), "batch 3, on cpu, and this stream of .*batch 2"),
        (model.stream(1), "batch 1"),
    ):
        with pytest.raises(ee.RequestError, match=says):
            stream.restore(wrong.snapshot())
    elsewhere = stream.snapshot()
    elsewhere.identity = (*elsewhere.identity[:-1], "cuda")
    for nothing in (elsewhere, None, before, stream, "mark"):
        with pytest.raises(ee.RequestError, match="snapshot"):
            stream.restore(nothing)
    assert same(contents(stream), before)
    assert stream.rewindable == rewindable


@pytest.mark.parametrize("back", range(5))
def test_rewinding_is_never_having_gone_there(model: ee.Model, back: int) -> None:
    sequence, other = frames(2, 9), frames(2, 4, seed=2)
    stream, plain = model.stream(2, history=5), model.stream(2)
    steps(stream, sequence)
    steps(plain, sequence[:, : 9 - back])
    stream.rewind(back)
    assert same(contents(stream), contents(plain))
    assert stream.rewindable == 5 - back
    np.testing.assert_array_equal(steps(stream, other), steps(plain, other))


def test_a_history_at_once_is_one_step_back(model: ee.Model) -> None:
    sequence, stream = frames(1, 12), model.stream()
    stream.step(sequence[:, 0])
    before = contents(stream)
    stream.prefill(sequence[:, 1:])
    stream.rewind(1)
    assert same(contents(stream), before)


def test_rewinding_further_than_the_history_is_refused(model: ee.Model) -> None:
    stream, sequence = model.stream(history=3), frames(1, 8)
    for done in range(8):
        before, rewindable = contents(stream), stream.rewindable
        assert rewindable == min(done, 3)
        for wrong in (rewindable + 1, 10**30):
            with pytest.raises(ee.RequestError, match=f"the history holds {rewindable}, of at most 3"):
                stream.rewind(wrong)
        for wrong in (-1, 1.0, True, "1", None, np.int64(1)):
            with pytest.raises(ee.RequestError, match="a number of frames from 0"):
                stream.rewind(wrong)
        assert same(contents(stream), before)
        assert stream.rewindable == rewindable
        stream.step(sequence[:, done])
    forgetful = model.stream(history=0)
    forgetful.step(sequence[:, 0])
    forgetful.rewind(0)
    with pytest.raises(ee.RequestError, match="holds 0, of at most 0"):
        forgetful.rewind(1)


def test_the_history_goes_back_with_a_snapshot_that_is_in_it(model: ee.Model) -> None:
    stream, sequence = model.stream(history=4), frames(1, 9)
    marks, states = [], []
    for t in range(9):
        marks.append(stream.snapshot())
        states.append(contents(stream))
        stream.step(sequence[:, t])
    stream.restore(stream.snapshot())  # where it is
    assert stream.rewindable == 4
    stream.restore(marks[7])
    assert stream.rewindable == 2
    stream.rewind(2)
    assert same(contents(stream), states[5])
    # One that the history has forgotten: nothing leads back from it.
    stream.restore(marks[2])
    assert stream.rewindable == 0
    stream.step(sequence[:, 2])
    assert same(contents(stream), states[3])
    stream.rewind(1)
    assert same(contents(stream), states[2])


# Resets


def test_a_reset_stream_is_a_new_one(model: ee.Model) -> None:
    sequence, stream = frames(2, 10), model.stream(2)
    first = steps(stream, sequence)
    stream.reset()
    assert stream.rewindable == 0
    assert same(contents(stream), contents(model.stream(2)))
    np.testing.assert_array_equal(steps(stream, sequence), first)


@pytest.mark.parametrize("entries", [[1], [0, 3], [3, 3], [], (2,), [np.int64(0), np.uint8(2)], np.array([1, 3])])
def test_a_reset_entry_starts_anew_and_the_others_do_not_notice(model: ee.Model, entries: Any) -> None:
    sequence, more = frames(4, 2 * WINDOW), frames(4, 2 * WINDOW, seed=4)
    stream, plain, fresh = model.stream(4), model.stream(4), model.stream(4)
    steps(stream, sequence)
    steps(plain, sequence)
    stream.reset(entries)
    chosen = sorted({int(entry) for entry in entries})
    others = [entry for entry in range(4) if entry not in chosen]
    untouched, new = contents(plain), contents(fresh)
    for name, value in contents(stream).items():
        np.testing.assert_array_equal(value[others], untouched[name][others])
        np.testing.assert_array_equal(value[chosen], new[name][chosen])
    found, wanted, started = (steps(each, more) for each in (stream, plain, fresh))
    np.testing.assert_array_equal(found[others], wanted[others])
    np.testing.assert_array_equal(found[chosen], started[chosen])


def test_rewinding_past_a_reset_of_some_undoes_it(model: ee.Model) -> None:
    sequence, stream = frames(2, 4), model.stream(2)
    steps(stream, sequence[:, :2])
    before = contents(stream)
    stream.step(sequence[:, 2])
    stream.reset([0])
    assert stream.rewindable == 3
    stream.rewind(1)
    assert same(contents(stream), before)


@pytest.mark.parametrize(
    "entries", [[2], [-1], [0, 5], [0.0], ["0"], [None], [True], [np.bool_(True)], [[0]], [10**30]]
)
@any_architecture
def test_entries_that_there_are_not_are_refused(model: ee.Model, entries: list[Any]) -> None:
    stream = model.stream(2)
    stream.step(frames(2))
    before = contents(stream)
    with pytest.raises(ee.RequestError, match="entries must be integers from 0 to 1"):
        stream.reset(entries)
    assert same(contents(stream), before)
    assert stream.rewindable == 1


# States in files


def test_a_saved_state_goes_on_bitwise(model: ee.Model, tmp_path: Path) -> None:
    sequence, stream = frames(2, 3 * WINDOW), model.stream(2)
    steps(stream, sequence[:, :10])
    stream.save(tmp_path / "state")
    wanted = steps(stream, sequence[:, 10:])
    for other in (stream, model.stream(2), ee.load(model.bundle.path, threads=1).stream(2)):
        other.step(frames(2, seed=7))
        other.load(str(tmp_path / "state"))
        assert other.rewindable == 0
        np.testing.assert_array_equal(steps(other, sequence[:, 10:]), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_saved_state_goes_on_bitwise_in_another_process(model: ee.Model, tmp_path: Path) -> None:
    sequence, stream = frames(1, 12), model.stream()
    steps(stream, sequence[:, :8])
    stream.save(tmp_path / "state")
    np.save(tmp_path / "frames.npy", sequence[:, 8:])
    script = f"""
        import numpy as np, edifice_export as ee
        stream = ee.load({str(model.bundle.path)!r}, threads=1).stream()
        stream.load("state")
        frames = np.load("frames.npy")
        np.save("outputs.npy", [stream.step(frames[:, t]) for t in range(4)])
        stream.save("later")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, timeout=60)
    found = np.load(tmp_path / "outputs.npy")
    np.testing.assert_array_equal(found, np.stack([stream.step(sequence[:, t]) for t in range(8, 12)]))
    before = contents(stream)
    stream.load(tmp_path / "later")
    assert same(contents(stream), before)


def refuses(stream: ee.Stream, path: Path, says: str) -> None:
    """A state that can't be loaded is named, and the stream stays where it was."""
    before, rewindable = contents(stream), stream.rewindable
    with pytest.raises(ee.RequestError, match=says) as caught:
        stream.load(path)
    assert f"state {path}: " in str(caught.value)
    assert same(contents(stream), before)
    assert stream.rewindable == rewindable


def test_a_state_of_another_bundle_or_batch_is_refused(
    model: ee.Model, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = model.stream(2)
    stream.step(frames(2))
    other = next(name for name in ARCHITECTURES if name != model.bundle.manifest.architecture)
    for index, (wrong, says) in enumerate(
        (
            (
                ee.load(tiny_bundle(other, tmp_path_factory)).stream(2),
                f"of another bundle: its architecture is '{other}'",
            ),
            (ee.load(with_other_weights(model.bundle)).stream(2), "of another bundle: its weights is '000000000"),
            (model.stream(1), r"should be float32 \[2, .* found float32 \[1, "),
            (model.stream(3), r"should be float32 \[2, .* found float32 \[3, "),
        )
    ):
        wrong.save(tmp_path / f"{index}")
        refuses(stream, tmp_path / f"{index}", says)
    refuses(stream, model.bundle.file("weights.safetensors"), "is not the state of a stream")
    refuses(stream, tmp_path / "none", "can't be read: .*o such file")
    refuses(stream, tmp_path, "can't be read")


def test_a_state_with_other_numbers_is_refused(model: ee.Model, tmp_path: Path) -> None:
    stream, path = model.stream(2), tmp_path / "state"
    steps(stream, frames(2, 3))
    stream.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        said = file.metadata()
    name = next(name for name in tensors if name.endswith("conv"))
    worse: list[tuple[dict[str, np.ndarray], str]] = [
        ({name: tensors[name].astype(np.float16)}, f"{name} should be float32 .* found float16"),
        ({name: tensors[name].astype(np.float64)}, f"{name} should be float32 .* found float64"),
        ({name: tensors[name].view(np.int32)}, f"{name} should be float32 .* found int32"),
        ({name: tensors[name][..., :-1].copy()}, f"{name} should be float32"),
        ({name: tensors[name][0].copy()}, f"{name} should be float32"),
        ({"9.ssm": tensors[name]}, "not those of this bundle's states: 9.ssm"),
    ]
    for value in (np.nan, np.inf, -np.inf):
        broken = tensors[name].copy()
        broken.flat[-1] = value
        worse.append(({name: broken}, f"{name} holds numbers that no stream has"))
    if "0.position" in tensors:
        for position in (-1, -(2**63), 2**63 - 1):
            worse.append(({"0.position": np.array([3, position])}, "0.position holds numbers that no stream has"))
    for changed, says in worse:
        save_file({**tensors, **changed}, path, said)
        refuses(stream, path, says)
    save_file({other: value for other, value in tensors.items() if other != name}, path, said)
    refuses(stream, path, f"not those of this bundle's states: {name}")
    save_file(tensors, path, {**said, "format": "edifice-export stream state 2"})
    refuses(stream, path, "is not the state of a stream")
    save_file(tensors, path, said)
    stream.load(path)


def test_a_damaged_file_is_no_state(model: ee.Model, tmp_path: Path) -> None:
    stream, path = model.stream(2), tmp_path / "state"
    steps(stream, frames(2, 3))
    stream.save(path)
    whole, before = path.read_bytes(), contents(stream)
    header = 8 + int.from_bytes(whole[:8], "little")
    stream.step(frames(2, seed=1))
    for cut in (0, 1, 7, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refuses(stream, path, "can't be read")
    path.write_bytes(b"not a state")
    refuses(stream, path, "can't be read")
    for place in range(header):
        for bit in (0x01, 0x04, 0x20, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            here = contents(stream)
            try:
                stream.load(path)
            except ee.RequestError:
                assert same(contents(stream), here)
            else:
                # A change of what says nothing, such as a space.
                assert same(contents(stream), before)
                stream.step(frames(2, seed=1))


def test_a_state_that_cannot_be_written_is_refused(model: ee.Model, tmp_path: Path) -> None:
    stream = model.stream()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/inside").write_bytes(b"")
    for target in (tmp_path / "no/state", tmp_path / "old", Path("/proc/state")):
        with pytest.raises(ee.RequestError, match=f"state {target}: can't be written"):
            stream.save(target)
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "inside"}


def test_a_state_is_written_whole_or_not_at_all(
    model: ee.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, path = model.stream(), tmp_path / "state"
    stream.save(path)
    old = path.read_bytes()
    stream.step(frames(1))
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(ee.RequestError, match="No space left on device"):
        stream.save(path)
    assert path.read_bytes() == old
    assert [found.name for found in tmp_path.iterdir()] == ["state"]


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
        *({"batch": value} for value in (0, -1, 1.5, True, "2", None, np.int64(2))),
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
        with pytest.raises(ee.CheckError, match=r"failed on \[2, 5, 6\] frames: .*out of memory"):
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
    """A session whose bindings are recorded."""

    def __init__(self, session: Any) -> None:
        self.session, self.log = session, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def io_binding(self) -> Recorded:
        return Recorded(self.session.io_binding(), self.log)

    def run_with_iobinding(self, binding: Recorded) -> None:
        self.log.append(("run", ""))
        self.session.run_with_iobinding(binding.binding)


@pytest.mark.parametrize("device", ["cpu", "cuda", "dml"])
@any_architecture
def test_a_frame_is_copied_to_the_device_at_every_step(
    model: ee.Model, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has none: what would be allocated there is here, and what is bound is noted."""
    monkeypatch.setattr(stream_module, "device_of", lambda _: device)
    asked = []

    def allocate(shape: list[int], dtype: Any, where: str) -> ort.OrtValue:
        asked.append(where)
        return ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7, dtype))

    monkeypatch.setattr(stream_module.ort.OrtValue, "ortvalue_from_shape_and_type", allocate)
    session = RecordedSession(model.session_of("stream"))
    stream = ee.Stream(model.bundle, session, model.session_of("prefill"), 2, 3)
    sequence = frames(2, 20)
    assert agrees(steps(stream, sequence), expected(model.bundle, sequence))
    assert set(asked) == ({device} if device != "cpu" else set())
    log = [kind for kind, name in session.log if name in ("frame", "")]
    # The last steps use bindings that were made before.
    last = ["input", "run", "synchronize"] if device != "cpu" else ["run", "synchronize"]
    assert log[-3 * len(last) :] == 3 * last
    assert log.count("run") == log.count("synchronize") == 20
    monkeypatch.undo()
    if device != "cpu":
        with pytest.raises(ee.RequestError, match=f"on {device}"):
            model.stream(2).restore(stream.snapshot())


# Everything at once


@dataclasses.dataclass(frozen=True, eq=False)
class Past:
    """What a state stands for: of each entry, its frames since it started. Two are the same only if they are one."""

    entries: tuple[tuple[int, ...], ...]

    def after(self, frame: int) -> Past:
        return Past(tuple((*entry, frame) for entry in self.entries))


def machine(bundle: ee.Bundle, folder: Path) -> type[RuleBasedStateMachine]:
    """Whatever is done to a stream of two entries, it is where a list of frames says."""
    model, batch, history = ee.load(bundle, threads=1), 2, 4

    def frame_of(seed: int) -> np.ndarray:
        return frames(batch, seed=seed)

    class Machine(RuleBasedStateMachine):
        @initialize()
        def open(self) -> None:
            self.stream = model.stream(batch, history)
            self.start = self.now = Past(((),) * batch)
            self.before: deque[Past] = deque(maxlen=history)
            self.snapshots: list[tuple[ee.Snapshot, Past]] = []
            self.files: list[tuple[Path, Past]] = []

        def check(self, output: np.ndarray) -> None:
            for entry, past in enumerate(self.now.entries):
                whole = np.stack([frame_of(seed)[entry] for seed in past])[None]
                assert agrees(output[entry], expected(bundle, whole)[0, -1])

        def go(self, after: Past) -> None:
            self.before.append(self.now)
            self.now = after

        @rule(seed=st.integers(0, 50))
        def step(self, seed: int) -> None:
            output = self.stream.step(frame_of(seed))
            self.go(self.now.after(seed))
            self.check(output)

        @rule(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=2 * WINDOW + 1))
        def prefill(self, seeds: list[int]) -> None:
            output = self.stream.prefill(np.stack([frame_of(seed) for seed in seeds], axis=1))
            after = self.now
            for seed in seeds:
                after = after.after(seed)
            self.go(after)
            self.check(output)

        @rule()
        def snapshot(self) -> None:
            self.snapshots.append((self.stream.snapshot(), self.now))

        @precondition(lambda self: self.snapshots)
        @rule(data=st.data())
        def restore(self, data: st.DataObject) -> None:
            snapshot, past = data.draw(st.sampled_from(self.snapshots))
            self.stream.restore(snapshot)
            if past is not self.now:
                steps_before = list(self.before)
                place = steps_before.index(past) if past in steps_before else 0
                self.before = deque(steps_before[:place], maxlen=history)
                self.now = past

        @precondition(lambda self: self.snapshots)
        @rule(data=st.data())
        def drop(self, data: st.DataObject) -> None:
            self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))

        @rule(count=st.integers(0, history + 1))
        def rewind(self, count: int) -> None:
            if count > len(self.before):
                with pytest.raises(ee.RequestError):
                    self.stream.rewind(count)
                return
            self.stream.rewind(count)
            for _ in range(count):
                self.now = self.before.pop()

        @rule()
        def reset(self) -> None:
            self.stream.reset()
            self.before.clear()
            self.now = self.start

        @rule(entries=st.lists(st.integers(0, batch - 1), max_size=2))
        def reset_entries(self, entries: list[int]) -> None:
            self.stream.reset(entries)
            self.now = Past(tuple(() if entry in entries else past for entry, past in enumerate(self.now.entries)))

        @rule()
        def save(self) -> None:
            self.files.append((folder / str(len(self.files)), self.now))
            self.stream.save(self.files[-1][0])

        @precondition(lambda self: self.files)
        @rule(data=st.data())
        def load(self, data: st.DataObject) -> None:
            path, past = data.draw(st.sampled_from(self.files))
            self.stream.load(path)
            self.before.clear()
            self.now = Past(past.entries)

        @rule(wrong=st.sampled_from([np.nan, np.inf]))
        def refuse(self, wrong: float) -> None:
            with pytest.raises(ee.RequestError, match="frame"):
                self.stream.step(frame_of(0) * np.float32(wrong))

        @invariant()
        def history_is_known(self) -> None:
            assert self.stream.rewindable == len(self.before)

        @invariant()
        def positions_are_known(self) -> None:
            state = contents(self.stream)
            if "0.position" in state:
                assert state["0.position"].tolist() == [len(past) for past in self.now.entries]

    return Machine


def test_whatever_is_done_to_a_stream_it_is_where_its_frames_say(bundle: ee.Bundle, tmp_path: Path) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    few = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=checks)
    run_machine(machine(bundle, tmp_path), settings=few)


# A million frames

MILLION = 1_000_000

REMEMBERING = {
    "h3": ("dt_log", -9, "out_proj.weight", 10),
    "hyena": None,
    "hymba": ("dt_proj.bias", -20, "mamba.out_proj.weight", 1000),
    "ss_transformer": ("dt_proj.bias", 9, "ssm.out_proj.weight", 100),
}
"""What makes a recurrence forget slowly (Hymba's as slowly as it can), and what makes the output depend on it."""


def remembering(name: str, folder: Path) -> ee.Bundle:
    """A bundle of one layer that remembers a frame for a thousand frames (hymba) or eight thousand.

    An error of 1e-7 in a decay would be seen. In memories that are longer still float32's sums are not exact to 1e-5.
    """
    architecture = ARCHITECTURES[name]
    made = architecture.model_class(architecture.config_class(**{**TINY, "num_layers": 1}))
    initialize_weights(made, 3)
    with torch.no_grad():
        for own, tensor in made.named_parameters():
            if own.endswith("norm.weight"):
                tensor.fill_(1)
            if own.endswith("dt_proj.weight"):
                tensor.zero_()
            if REMEMBERING[name] is not None:
                step, value, weight, factor = REMEMBERING[name]
                if own.endswith(step):
                    tensor.fill_(value)
                if own.endswith(weight):
                    tensor.mul_(factor)
    save_torch_file(made.state_dict(), folder / "weights.safetensors", {"module": name})
    given = {
        option: getattr(made.config, option) for option in ("num_heads", "window_size") if hasattr(made.config, option)
    }
    return ee.build(name, weights=folder / "weights.safetensors", graph="stream", output=folder / "b", **given)


def resident() -> int:
    """Bytes that this process needs: what its allocator merely kept for later is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_million_steps(name: str, tmp_path: Path) -> None:
    """At every one of them the output is the float64 reference's, and memory does not grow."""
    bundle = remembering(name, tmp_path)
    exact, stream = reference(bundle), ee.load(bundle, threads=1).stream()
    state, largest, worst, grown_from = exact.initial_state(1), 1.0, 0.0, 0
    piece = 4000
    for start in range(0, MILLION, piece):
        sequence = frames(1, piece, seed=start)
        with torch.no_grad():
            outputs, state = exact.extend(torch.tensor(sequence).double(), state)
        wanted, found = outputs.numpy(), steps(stream, sequence)
        assert np.isfinite(found).all()
        largest = max(largest, float(np.abs(wanted).max()))
        worst = max(worst, float(np.abs(found - wanted).max()))
        assert worst <= 1e-5 * largest, f"after {start + piece} frames"
        if start == MILLION // 10:
            grown_from = resident()
    # A step that lost 8 bytes would be seen.
    assert resident() - grown_from < 6 * 2**20
    if REMEMBERING[name] is not None:
        # It is no small part that could have drifted unseen: without what the recurrence remembers, all is different.
        forgetful = {kind: torch.zeros_like(value) if kind.endswith("ssm") else value for kind, value in state.items()}
        more = torch.tensor(frames(1, 100)).double()
        with torch.no_grad():
            difference = (exact.extend(more, forgetful)[0] - exact.extend(more, state)[0]).abs().max()
        assert difference > 0.1
