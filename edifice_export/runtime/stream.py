"""A stream: one frame in, one output out, and a state that can be saved, restored and rewound.

Each step reads one set of buffers and writes another; a set that anybody still refers to (a snapshot, the history) is
never written to. So nothing is updated in place, and taking a snapshot or going back to one copies nothing. The buffers
are where the provider computes, and stay there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort

from ..arguments import whole_number
from ..bundle.bundle import Bundle
from ..errors import RequestError
from ..machine import physical_memory
from ..specification import StateSpec, TensorSpec
from ..writing.files import is_within
from .arrays import check_array, check_finite
from .providers import ORT_ERRORS, device_of, failed, placement, short_name
from .state_file import read_state, sizes_of, write_state

__all__ = ["HISTORY", "MAX_HISTORY", "Snapshot", "Stream"]

HISTORY = 16
"""Frames that a stream can be rewound by, unless told otherwise."""

MAX_HISTORY = 100_000

_MAX_BINDINGS = 4096
_PIECE = 1024
"""Frames that are handed over at once when a longer history is prefilled, unless the window is longer."""

_STAYS = ", and the stream stays where it was"


class Stream:
    """A number of streams side by side, over sessions that many Stream objects may share.

    One Stream is for one thread at a time; different Streams may run in different threads at once.

    Attributes:
        batch: how many streams, the entries of every frame and output.
        history: frames that it can be rewound by at most.
        frame: what a step takes, frame float32 [batch, embed_dim].
        output: what it gives, output float32 [batch, hidden_size].
        placement: nodes of the stream graph run by each provider, by short name.
    """

    def __init__(
        self, bundle: Bundle, step: ort.InferenceSession, prefill: ort.InferenceSession, batch: int, history: int
    ) -> None:
        batch = whole_number("batch", batch, 1)
        history = whole_number("history", history, 0, MAX_HISTORY)
        graph = bundle.manifest.graphs["stream"]
        _check_memory(bundle, batch)
        self.bundle, self.batch, self.history = bundle, batch, history
        self.frame, self.output = graph.inputs[0], graph.outputs[0]
        self._sequence = bundle.manifest.graphs["prefill"].inputs[0]
        self._step, self._prefill = step, prefill
        self.placement = placement(step)
        self._states = bundle.manifest.states
        self._device = device_of(step)
        # Other providers than the CPU's may take a copy when an input is bound, and go on with that.
        self._reads_in_place = short_name(step.get_providers()[0]) == "cpu"
        self._free: deque[_Buffers] = deque()
        self._own: dict[int, _Buffers] = {}
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._input = np.zeros((batch, int(self.frame.shape[1])), np.float32)
        self._result = np.zeros((batch, int(self.output.shape[1])), np.float32)
        self._input_value = ort.OrtValue.ortvalue_from_numpy(self._input)
        self._result_value = ort.OrtValue.ortvalue_from_numpy(self._result)
        self._initial = self._upload(bundle.initial_state(batch))
        self._current = self._initial
        self._before: deque[_State] = deque(maxlen=history)

    @property
    def rewindable(self) -> int:
        """By how many frames it can be rewound now."""
        return len(self._before)

    def __reduce__(self) -> NoReturn:
        _refuse_copy(self)

    def step(self, frame: np.ndarray) -> np.ndarray:
        """One frame on.

        Args:
            frame: float32 [batch, embed_dim], or [embed_dim] of a single stream.

        Returns:
            float32 [batch, hidden_size], or [hidden_size].

        Raises:
            RequestError: another rank, width, batch or dtype, or a NaN or a number beyond MAX_MAGNITUDE.
            CheckError: ONNX Runtime could not run it, or the output is not finite.

        The stream stays where it was then.
        """
        single = self._check(frame, self.frame, "step")
        self._input[:] = frame
        after = self._take()
        try:
            binding = self._binding(self._current.buffers, after.buffers)
            self._step.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except ORT_ERRORS as error:
            raise failed(f"a frame of {self.batch} streams", error) from error
        check_finite(self._result, self.output.name, _STAYS)
        self._advance(after)
        return self._result[0].copy() if single else self._result.copy()

    def prefill(self, state_sequence: np.ndarray) -> np.ndarray:
        """Many frames on at once: what as many steps give, faster, and their last output.

        For a history that a stream starts with, or frames that are simulated again. Rewinding goes back over all of
        them as over one frame.

        Args:
            state_sequence: float32 [batch, sequence, embed_dim], or [sequence, embed_dim] of a single stream.

        Returns:
            The output at the last frame, float32 [batch, hidden_size], or [hidden_size].

        Raises:
            RequestError, CheckError: as for step.
        """
        single = self._check(state_sequence, self._sequence, "prefill")
        frames = np.ascontiguousarray(state_sequence[None] if single else state_sequence)
        length = max(_PIECE, self.bundle.manifest.window_size)
        state, output = self._current, self._result
        for start in range(0, frames.shape[1], length):
            state, output = self._run_prefill(np.ascontiguousarray(frames[:, start : start + length]), state)
            check_finite(output, self.output.name, _STAYS)
        self._advance(state)
        return output[0].copy() if single else output

    def reset(self, entries: Sequence[int] | None = None) -> None:
        """Back to before the first frame, for all streams or for some entries of the batch.

        After a reset of all there is nothing to rewind; rewinding past a reset of some undoes it.

        Raises:
            RequestError: an entry that there is not.
        """
        if entries is None:
            self._current = self._initial
            self._before.clear()
            return
        chosen = list(entries) if isinstance(entries, (Sequence, np.ndarray)) else [entries]
        sound = isinstance(entries, (Sequence, np.ndarray)) and all(
            (type(entry) is int or isinstance(entry, np.integer)) and 0 <= entry < self.batch for entry in chosen
        )
        if not sound:
            raise RequestError(f"entries must be integers from 0 to {self.batch - 1}, got {entries!r:.80}")
        state, initial = self._download(self._current), self._download(self._initial)
        for name in state:
            state[name][chosen] = initial[name][chosen]
        self._current = self._upload(state)

    def snapshot(self) -> Snapshot:
        """The state now. It copies nothing, and the buffers live as long as the snapshot."""
        return Snapshot(self._current, self._identity())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes to a snapshot of this stream, or of another of the same bundle, batch and device. It copies nothing.

        What comes next is bitwise what came after the snapshot, given the same frames. The history goes back with it
        where the snapshot is in it, and is forgotten otherwise.

        Raises:
            RequestError: a snapshot of another bundle, batch or device.
        """
        if not isinstance(snapshot, Snapshot):
            raise RequestError(f"restore takes a snapshot of a stream, got {type(snapshot).__name__}")
        if snapshot.identity != self._identity():
            raise RequestError(
                f"the snapshot is of {_describe(snapshot.identity)}, and this stream of {_describe(self._identity())}; "
                "restore it where it was taken"
            )
        if snapshot.state is self._current:
            return
        steps = list(self._before)
        place = next((index for index, state in enumerate(steps) if state is snapshot.state), 0)
        self._before = deque(steps[:place], maxlen=self.history)
        self._current = snapshot.state

    def rewind(self, frames: int) -> None:
        """Back by a number of frames. It copies nothing.

        Raises:
            RequestError: more frames than the history holds.
        """
        frames = whole_number("frames to rewind", frames, 0)
        if frames > self.rewindable:
            raise RequestError(
                f"rewind {frames} frames: the history holds {self.rewindable}, of at most {self.history}; "
                "open the stream with a larger history, or keep snapshots"
            )
        for _ in range(frames):
            self._current = self._before.pop()

    def save(self, path: str | Path) -> None:
        """Writes the state now to a safetensors file, whole or not at all.

        Raises:
            RequestError: the file can't be written, or the state is one that `load` refuses.
        """
        if is_within(Path(path), self.bundle.path):
            raise RequestError(
                f"state {path}: is inside the bundle, which holds its own files only; name another place"
            )
        write_state(Path(path), self._download(self._current), self._names())

    def load(self, path: str | Path) -> None:
        """Goes to a saved state; there is nothing to rewind then.

        Raises:
            RequestError: the file can't be read, is damaged, or holds a state of another bundle or batch, or numbers
                that are not finite or beyond MAX_STATE. The stream stays where it was.
        """
        tensors = read_state(Path(path), self._names(), self._states, self.batch)
        self._current = self._upload(tensors)
        self._before.clear()

    def _names(self) -> dict[str, str]:
        """What tells the states of one bundle from those of another: the weights with their options and numerics."""
        manifest = self.bundle.manifest
        return {"architecture": manifest.architecture, "weights": manifest.files[manifest.reference].sha256}

    def _identity(self) -> tuple[str, ...]:
        return *self._names().values(), f"batch {self.batch}", self._device

    def _check(self, frames: np.ndarray, spec: TensorSpec, verb: str) -> bool:
        """Refuses frames that are not of this stream; says whether they lack the batch axis."""
        check_array(frames, spec)
        single = frames.ndim < len(spec.shape)
        found = 1 if single else frames.shape[0]
        if found != self.batch:
            raise RequestError(f"{verb}: {spec.name} has a batch of {found}, and the stream one of {self.batch}")
        return single

    def _advance(self, after: _State) -> None:
        self._before.append(self._current)
        self._current = after

    def _run_prefill(self, frames: np.ndarray, before: _State) -> tuple[_State, np.ndarray]:
        after, output = self._take(), np.zeros_like(self._result)
        binding = self._prefill.io_binding()
        binding.bind_cpu_input(self._sequence.name, frames)
        binding.bind_ortvalue_output(self.output.name, ort.OrtValue.ortvalue_from_numpy(output))
        self._bind_states(binding, before.buffers, after.buffers)
        try:
            self._prefill.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except ORT_ERRORS as error:
            raise failed(f"{self._sequence.name} {list(frames.shape)}", error) from error
        return after, output

    def _binding(self, past: _Buffers, present: _Buffers) -> ort.IOBinding:
        key = id(past), id(present)
        if not self._reads_in_place or len(self._bindings) >= _MAX_BINDINGS:
            self._bindings.clear()
        if key not in self._bindings:
            binding = self._step.io_binding()
            binding.bind_ortvalue_input(self.frame.name, self._input_value)
            binding.bind_ortvalue_output(self.output.name, self._result_value)
            self._bind_states(binding, past, present)
            if id(past) not in self._own:
                return binding  # a set of another stream, which may be gone soon
            self._bindings[key] = binding
        return self._bindings[key]

    def _bind_states(self, binding: ort.IOBinding, past: _Buffers, present: _Buffers) -> None:
        for state, read, written in zip(self._states, past, present, strict=True):
            binding.bind_ortvalue_input(state.past.name, read)
            binding.bind_ortvalue_output(state.present.name, written)

    def _take(self) -> _State:
        """A set of buffers that nobody refers to."""
        try:
            return _State(self._free.popleft(), self._free)
        except IndexError:
            buffers = [self._allocate(state) for state in self._states]
            self._own[id(buffers)] = buffers
            return _State(buffers, self._free)

    def _allocate(self, state: StateSpec) -> ort.OrtValue:
        shape = sizes_of(state, self.batch)
        if self._device == "cpu":
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, state.dtype))
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(state.dtype), self._device)

    def _upload(self, arrays: Mapping[str, np.ndarray]) -> _State:
        taken = self._take()
        for state, buffer in zip(self._states, taken.buffers, strict=True):
            buffer.update_inplace(np.ascontiguousarray(arrays[state.name]))
        return taken

    def _download(self, held: _State) -> dict[str, np.ndarray]:
        return {state.name: np.array(buffer.numpy()) for state, buffer in zip(self._states, held.buffers, strict=True)}


class Snapshot:
    """The state of a stream at one moment: for restore of that stream or one of the same bundle, batch and device.

    It can't be copied, and need not: nothing changes it.
    """

    def __init__(self, state: _State, identity: tuple[str, ...]) -> None:
        self.state, self.identity = state, identity

    def __reduce__(self) -> NoReturn:
        _refuse_copy(self)


_Buffers = list[Any]


class _State:
    """A set of buffers in use; when the last reference to it is gone, they are free again."""

    __slots__ = ("_free", "buffers")

    def __init__(self, buffers: _Buffers, free: deque[_Buffers]) -> None:
        self.buffers, self._free = buffers, free

    def __del__(self) -> None:
        self._free.append(self.buffers)

    def __reduce__(self) -> NoReturn:
        _refuse_copy(self)


def _check_memory(bundle: Bundle, batch: int) -> None:
    """Refuses more streams than memory holds: two states, the initial one and the next, frames and outputs."""
    graph, manifest = bundle.manifest.graphs["stream"], bundle.manifest
    frame = sum(int(spec.shape[1]) for spec in (graph.inputs[0], graph.outputs[0]))
    state = sum(math.prod(sizes_of(spec, 1)) * np.dtype(spec.dtype).itemsize for spec in manifest.states)
    needed, memory = batch * (2 * state + 4 * frame), physical_memory()
    if memory is not None and needed > memory:
        raise RequestError(
            f"batch {batch}: as many streams take {needed / 2**30:,.0f} GiB of memory for their states and this "
            f"machine has {memory / 2**30:,.0f}; open fewer"
        )


def _refuse_copy(what: object) -> NoReturn:
    """Two of them would free, or write to, the same buffers."""
    raise RequestError(f"a {type(what).__name__.strip('_')} can't be copied or pickled; use snapshot, or save and load")


def _describe(identity: tuple[str, ...]) -> str:
    architecture, weights, batch, device = identity
    return f"{architecture} with weights {weights[:12]}, {batch}, on {device}"
