"""A stream: one frame in, one output out, and a state that can be saved, restored and rewound.

Each step reads one set of buffers and writes another; a set that anybody still refers to (a snapshot, the history) is
never written to. So nothing is updated in place, and taking a snapshot or going back to one copies nothing. The buffers
are where the provider computes, and stay there. States that grow have no buffers: ONNX Runtime makes new ones at every
step, and they go with the last reference.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort

from ..arguments import path_of, several, whole_number
from ..bundle.bundle import Bundle
from ..errors import RequestError
from ..machine import physical_memory
from ..specification import InputSpec, StateSpec, TensorSpec
from ..writing.files import is_within
from .arrays import check_array, check_finite, check_sizes
from .providers import ORT_ERRORS, device_of, failed, placement, short_name
from .state_file import read_state, write_state

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
        inputs: what a step takes beside the state, such as frame float32 [batch, embed_dim].
        outputs: what it gives beside the state, such as output float32 [batch, hidden_size].
        placement: nodes of the stream graph run by each provider, by short name.
    """

    def __init__(
        self, bundle: Bundle, step: ort.InferenceSession, prefill: ort.InferenceSession | None, batch: int, history: int
    ) -> None:
        batch = whole_number("batch", batch, 1)
        history = whole_number("history", history, 0, MAX_HISTORY)
        manifest = bundle.manifest
        self.inputs, self.outputs = manifest.own_tensors("stream")
        _check_memory(bundle, batch)
        self.bundle, self.batch, self.history = bundle, batch, history
        self._sequences = manifest.own_tensors("prefill")[0] if prefill is not None else ()
        self._step, self._prefill = step, prefill
        self.placement = placement(step)
        self._states = tuple(state for state in manifest.states if not state.grows)
        self._growing = tuple(state for state in manifest.states if state.grows)
        self._device = device_of(step)
        # Other providers than the CPU's may take a copy when an input is bound, and go on with that.
        self._reads_in_place = short_name(step.get_providers()[0]) == "cpu"
        self._free: deque[_Buffers] = deque()
        self._own: dict[int, _Buffers] = {}
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._frame = [np.zeros(_shape(spec, batch), spec.dtype) for spec in self.inputs]
        self._result = [np.zeros(_shape(spec, batch), spec.dtype) for spec in self.outputs]
        self._frame_values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._frame]
        self._result_values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._result]
        self._initial = self._upload(bundle.initial_state(batch))
        self._current = self._initial
        self._before: deque[_State] = deque(maxlen=history)

    @property
    def rewindable(self) -> int:
        """By how many frames it can be rewound now."""
        return len(self._before)

    def __reduce__(self) -> NoReturn:
        _refuse_copy(self)

    def step(self, *frame: np.ndarray) -> Any:
        """One frame on.

        Args:
            frame: the inputs in their order, such as float32 [batch, embed_dim]; of a single stream without the batch.

        Returns:
            The output, such as float32 [batch, hidden_size], or a tuple of several.

        Raises:
            RequestError: another number of inputs, rank, width, batch or dtype, a NaN, a number beyond MAX_MAGNITUDE,
                or an id that there is not.
            CheckError: ONNX Runtime could not run it, or an output is not finite.

        The stream stays where it was then.
        """
        single = self._check(frame, self.inputs, "step")
        for held, given in zip(self._frame, frame, strict=True):
            held[:] = given
        after = self._take()
        try:
            binding = self._binding(self._current, after)
            self._run(self._step, binding, after)
        except ORT_ERRORS as error:
            raise failed(f"a frame of {self.batch} streams", error) from error
        self._check_finite(self._result)
        self._advance(after)
        return _given_back([array[0].copy() if single else array.copy() for array in self._result])

    def prefill(self, *sequence: np.ndarray) -> Any:
        """Many frames on at once: what as many steps give, faster, and their last output.

        For a history that a stream starts with, or frames that are simulated again. Rewinding goes back over all of
        them as over one frame.

        Args:
            sequence: the inputs in their order, such as float32 [batch, sequence, embed_dim]; of a single stream
                without the batch.

        Returns:
            The output at the last frame, such as float32 [batch, hidden_size], or a tuple of several.

        Raises:
            RequestError: as for step; or the bundle has no prefill graph.
            CheckError: as for step.
        """
        if self._prefill is None:
            raise RequestError(f"bundle {self.bundle.path}: has no prefill graph, as its module has none; use step")
        single = self._check(sequence, self._sequences, "prefill")
        frames = [np.ascontiguousarray(array[None] if single else array) for array in sequence]
        manifest = self.bundle.manifest
        limits = {symbol: of for symbol, of in manifest.graphs["prefill"].limits.items() if symbol != manifest.frames}
        check_sizes(frames, self._sequences, limits)
        piece = max(_PIECE, manifest.window_size)
        piece = min(piece, manifest.max_frames("prefill") or piece)
        state, outputs = self._current, self._result
        for start in range(0, frames[0].shape[1], piece):
            pieces = [np.ascontiguousarray(array[:, start : start + piece]) for array in frames]
            state, outputs = self._run_prefill(pieces, state)
            self._check_finite(outputs)
        self._advance(state)
        return _given_back([array[0].copy() if single else array for array in outputs])

    def reset(self, entries: Sequence[int] | None = None) -> None:
        """Back to before the first frame, for all streams or for some entries of the batch.

        After a reset of all there is nothing to rewind; rewinding past a reset of some undoes it.

        Raises:
            RequestError: an entry that there is not, or some of a stream whose states grow.
        """
        if entries is None:
            self._current = self._initial
            self._before.clear()
            return
        chosen = [
            whole_number("each of entries", entry, 0, self.batch - 1)
            for entry in several("entries", entries, "integers")
        ]
        if self._growing:
            raise RequestError(
                f"reset {chosen}: {self._growing[0].name} grows with the stream, and is as long for every entry of the "
                "batch; reset all, or open a stream for each"
            )
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
            raise RequestError(f"snapshot must be one of a stream, got {type(snapshot).__name__}")
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
        path = path_of("path", path)
        if is_within(path, self.bundle.path):
            raise RequestError(
                f"state {path}: is inside the bundle, which holds its own files only; name another place"
            )
        write_state(path, self._download(self._current), self._names())

    def load(self, path: str | Path) -> None:
        """Goes to a saved state; there is nothing to rewind then.

        Raises:
            RequestError: the file can't be read, is damaged, or holds a state of another bundle or batch, or numbers
                that are not finite or beyond MAX_STATE. The stream stays where it was.
        """
        states = self.bundle.manifest.states
        tensors = read_state(path_of("path", path), self._names(), states, self.batch)
        self._current = self._upload(tensors)
        self._before.clear()

    def _names(self) -> dict[str, str]:
        """What tells the states of one bundle from those of another: the weights with their options and numerics."""
        manifest = self.bundle.manifest
        program, reference = manifest.program, manifest.reference
        weights = manifest.files[reference].sha256 if reference is not None else manifest.weights["sha256"]
        return {program.kind: program.name, "weights": weights}

    def _identity(self) -> tuple[str, ...]:
        return *self._names().values(), f"batch {self.batch}", self._device

    def _check(self, frames: Sequence[np.ndarray], specs: Sequence[InputSpec], verb: str) -> bool:
        """Refuses frames that are not of this stream; says whether they lack the batch axis."""
        if len(frames) != len(specs):
            raise RequestError(f"{verb} takes {', '.join(map(str, specs))}; got {len(frames)} arrays")
        singles = set()
        for array, spec in zip(frames, specs, strict=True):
            check_array(array, spec)
            single = array.ndim < len(spec.shape)
            singles.add(single)
            found = 1 if single else array.shape[0]
            if found != self.batch or len(singles) > 1:
                raise RequestError(f"{verb}: {spec.name} has a batch of {found}, and the stream one of {self.batch}")
        return singles.pop()

    def _check_finite(self, outputs: Sequence[np.ndarray]) -> None:
        for spec, array in zip(self.outputs, outputs, strict=True):
            check_finite(array, spec.name, _STAYS)

    def _advance(self, after: _State) -> None:
        self._before.append(self._current)
        self._current = after

    def _run_prefill(self, frames: Sequence[np.ndarray], before: _State) -> tuple[_State, list[np.ndarray]]:
        assert self._prefill is not None
        after, outputs = self._take(), [np.zeros_like(array) for array in self._result]
        binding = self._prefill.io_binding()
        for spec, array in zip(self._sequences, frames, strict=True):
            binding.bind_cpu_input(spec.name, array)
        for output, array in zip(self.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))
        self._bind_states(binding, before, after)
        try:
            self._run(self._prefill, binding, after)
        except ORT_ERRORS as error:
            given = ", ".join(
                f"{spec.name} {list(array.shape)}" for spec, array in zip(self._sequences, frames, strict=True)
            )
            raise failed(given, error) from error
        return after, outputs

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding, after: _State) -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if self._growing:
            after.grown = binding.get_outputs()[-len(self._growing) :]

    def _binding(self, past: _State, present: _State) -> ort.IOBinding:
        key = id(past.buffers), id(present.buffers)
        if not self._reads_in_place or len(self._bindings) >= _MAX_BINDINGS:
            self._bindings.clear()
        if key not in self._bindings:
            binding = self._step.io_binding()
            for spec, value in zip(self.inputs, self._frame_values, strict=True):
                binding.bind_ortvalue_input(spec.name, value)
            for output, value in zip(self.outputs, self._result_values, strict=True):
                binding.bind_ortvalue_output(output.name, value)
            self._bind_states(binding, past, present)
            if key[0] not in self._own or self._growing:
                return binding  # a set of another stream, which may be gone soon, or that of one step
            self._bindings[key] = binding
        return self._bindings[key]

    def _bind_states(self, binding: ort.IOBinding, past: _State, present: _State) -> None:
        for state, read, written in zip(self._states, past.buffers, present.buffers, strict=True):
            binding.bind_ortvalue_input(state.past.name, read)
            binding.bind_ortvalue_output(state.present().name, written)
        for state, read in zip(self._growing, past.grown, strict=True):  # last, as they are looked for
            binding.bind_ortvalue_input(state.past.name, read)
            binding.bind_output(state.present().name, self._device)

    def _take(self) -> _State:
        """A set of buffers that nobody refers to."""
        try:
            return _State(self._free.popleft(), self._free)
        except IndexError:
            buffers = [self._allocate(state) for state in self._states]
            self._own[id(buffers)] = buffers
            return _State(buffers, self._free)

    def _allocate(self, state: StateSpec) -> ort.OrtValue:
        shape = state.of(self.batch)
        if self._device == "cpu":
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, state.dtype))
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(state.dtype), self._device)

    def _upload(self, arrays: Mapping[str, np.ndarray]) -> _State:
        taken = self._take()
        for state, buffer in zip(self._states, taken.buffers, strict=True):
            buffer.update_inplace(np.ascontiguousarray(arrays[state.name]))
        # On the CPU it is the array itself, which nothing else writes to.
        grown = (np.ascontiguousarray(arrays[state.name]) for state in self._growing)
        taken.grown = [ort.OrtValue.ortvalue_from_numpy(array, self._device) for array in grown]
        return taken

    def _download(self, held: _State) -> dict[str, np.ndarray]:
        fixed, grown = zip(self._states, held.buffers, strict=True), zip(self._growing, held.grown, strict=True)
        return {state.name: np.array(buffer.numpy()) for state, buffer in (*fixed, *grown)}


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
    """A set of buffers in use; when the last reference to it is gone, they are free again.

    Attributes:
        buffers: of the states that keep their size.
        grown: the values of those that grow, which go with it.
    """

    __slots__ = ("_free", "buffers", "grown")

    def __init__(self, buffers: _Buffers, free: deque[_Buffers]) -> None:
        self.buffers, self._free = buffers, free
        self.grown: _Buffers = []

    def __del__(self) -> None:
        self._free.append(self.buffers)

    def __reduce__(self) -> NoReturn:
        _refuse_copy(self)


def _shape(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """Of a frame or what comes out for it, for so many streams."""
    return tuple(size if isinstance(size, int) else batch for size in spec.shape)


def _given_back(outputs: list[np.ndarray]) -> Any:
    """One output as it is, several as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _check_memory(bundle: Bundle, batch: int) -> None:
    """Refuses more streams than memory holds: two states, the initial one and the next, frames and outputs."""
    inputs, outputs = bundle.manifest.own_tensors("stream")
    frame = sum(math.prod(_shape(spec, 1)) for spec in (*inputs, *outputs))
    state = sum(math.prod(spec.of(1)) * np.dtype(spec.dtype).itemsize for spec in bundle.manifest.states)
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
