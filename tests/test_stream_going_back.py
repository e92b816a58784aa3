"""Streams: snapshots, rewinding and resets are exact, and copy nothing."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from conftest import any_architecture, tiny_bundle
from stream_helpers import WINDOW, agrees, contents, expected, frames, same, steps, with_other_weights

import edifice_export as ee
from edifice_export.runtime import stream as stream_module
from edifice_reference.models.registry import ARCHITECTURES


@pytest.fixture(scope="module")
def model(bundle: ee.Bundle) -> ee.Model:
    return ee.load(bundle, threads=1)


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
        # What they are known by are the ids of buffers that live as long as the stream.
        assert all(known_by in stream._own for both in stream._bindings for known_by in both)
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


def test_snapshots_of_anything_else_are_refused(model: ee.Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    stream = model.stream(2)
    stream.step(frames(2))
    before, rewindable = contents(stream), stream.rewindable
    names = iter(ARCHITECTURES)
    other = next(name for name in names if name != model.bundle.manifest.program.name)
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
        for wrong in (-1, 1.0, True, "1", None, np.bool_(True)):
            with pytest.raises(ee.RequestError, match="frames to rewind must be an integer from 0"):
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
    with pytest.raises(ee.RequestError, match="each of entries must be an integer from 0 to 1, got"):
        stream.reset(entries)
    assert same(contents(stream), before)
    assert stream.rewindable == 1
