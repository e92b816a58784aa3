"""Streams: whatever is done to one, and a million frames."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from safetensors.torch import save_file as save_torch_file
from stream_helpers import WINDOW, agrees, contents, expected, frames, reference, steps

import edifice_export as ee
from edifice_reference.models.layers import initialize as initialize_weights
from edifice_reference.models.registry import ARCHITECTURES

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
            if name in REMEMBERING:
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
    if name in REMEMBERING:
        # It is no small part that could have drifted unseen: without what the recurrence remembers, all is different.
        forgetful = {kind: torch.zeros_like(value) if kind.endswith("ssm") else value for kind, value in state.items()}
        more = torch.tensor(frames(1, 100)).double()
        with torch.no_grad():
            difference = (exact.extend(more, forgetful)[0] - exact.extend(more, state)[0]).abs().max()
        assert difference > 0.1
