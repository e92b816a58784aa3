"""Contestants: what is timed in turn at one point, each with the same input.

    bundle     the bundle's graph, run by ONNX Runtime; of frames in a bare loop, its states in two sets of buffers
    step       a stream's frame as Python programs run it, with its checks; states that grow are a window long before it

and the bare products that it can't do without, see products, and the alternatives to it, see alternatives.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ..bundle.bundle import Bundle
from ..bundle.manifest import ARCHITECTURE
from ..machine import why_no_torch
from ..runtime.arrays import batch_symbol
from ..runtime.model import Model, load
from ..runtime.providers import device_of, short_name
from ..runtime.stream import Stream
from ..values import draw
from .plan import Point

if TYPE_CHECKING:
    from torch import Tensor

    from edifice_reference.models.contract import ReferenceModel

__all__ = ["Contestant", "Subject", "bundle_contestants", "forward"]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work of a point.

    Attributes:
        name: see the top of this module.
        run: does it once, and gives the output [batch, hidden_size]; None from what has none. Of a stream, the first
            run is its first frame.
        model: the ONNX file that it runs, if it is one that has a footprint of its own.
        inputs: what that file is run on.
    """

    name: str
    run: Callable[[], Any]
    model: Path | None = None
    inputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Subject:
    """A bundle that is measured, and what contestants share: open models, and the reference where torch is here.

    Attributes:
        reference: the reference model of an architecture, float32; None without torch, or of somebody's module.
        frozen: the same with what no input changes as values, as the bundle's graphs have it.
        exact: the reference in float64.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[str]) -> None:
        self.bundle, self.providers = bundle, list(providers)
        self._models: dict[int, Model] = {}
        self.reference: ReferenceModel | None = None
        if why_no_torch() is None and bundle.manifest.program.kind == ARCHITECTURE:
            from ..programs.freeze import freeze
            from ..programs.reference_model import reference_of

            self.reference = reference_of(bundle)
            self.frozen = freeze(self.reference)
            self.exact = copy.deepcopy(self.reference).double()

    def model(self, threads: int) -> Model:
        """The bundle, opened with this many threads."""
        if threads not in self._models:
            self._models[threads] = load(self.bundle, self.providers, threads)
        return self._models[threads]

    def inputs(self, point: Point) -> dict[str, np.ndarray]:
        """Random inputs of the point's graph, by name, but for states."""
        manifest, generator = self.bundle.manifest, np.random.default_rng(0)
        specs, sizes = manifest.own_tensors(point.graph)[0], dict(manifest.sizes)
        batch = batch_symbol(*manifest.own_tensors(point.graph))
        if batch is not None:
            sizes[batch] = point.batch
        if manifest.frames is not None:
            sizes[manifest.frames] = point.length
        return {spec.name: draw(spec, sizes, generator) for spec in specs}


def forward(model: ReferenceModel, point: Point, frames: Tensor) -> Callable[[], Tensor]:
    """What gives the output of a torch model, run after run; of a stream, each goes on from the one before."""
    if point.graph == "window":
        return lambda: model(frames)
    state = model.initial_state(point.batch)

    def on() -> Tensor:
        nonlocal state
        output, state = model.extend(frames, state)
        return output if point.graph == "stream" else output[:, -1]

    return on


def bundle_contestants(subject: Subject, point: Point, given: Mapping[str, np.ndarray]) -> list[Contestant]:
    """`bundle`, and of a stream `step`."""
    model = subject.model(point.threads)
    entry = subject.bundle.manifest.graphs[point.graph]
    path, session = subject.bundle.file(entry.model), model.session_of(point.graph)
    if point.graph == "window":
        return [Contestant("bundle", lambda: session.run(None, given)[0], path, given)]
    manifest = subject.bundle.manifest
    states = {f"past.{name}": value for name, value in subject.bundle.initial_state(point.batch).items()}
    for state in manifest.states:
        if state.grows:
            states[state.past.name] = np.zeros(state.of(point.batch, manifest.window_size), state.dtype)
    inputs = {**given, **states}
    stream, frames = _stream(model, point.batch), [*given.values()]
    if point.graph == "prefill":
        return [Contestant("bundle", lambda: _first(stream().prefill(*frames)), path, inputs)]
    outputs = {
        spec.name: np.zeros([size if isinstance(size, int) else point.batch for size in spec.shape], spec.dtype)
        for spec in manifest.own_tensors("stream")[1]
    }
    grow = {state.past.name for state in manifest.states if state.grows}
    loop = _frame_loop(session, given, states, outputs, grow)
    return [Contestant("bundle", loop, path, inputs), Contestant("step", lambda: _first(stream().step(*frames)))]


def _stream(model: Model, batch: int) -> Callable[[], Stream]:
    """A stream that goes on at every turn; where its states grow, always from after a window's frames."""
    stream, manifest = model.stream(batch, history=0), model.bundle.manifest
    if not manifest.grows:
        return lambda: stream
    generator = np.random.default_rng(1)
    drawn = [draw(spec.framed(manifest.window_size, batch), {}, generator) for spec in stream.inputs]
    for t in range(manifest.window_size):
        stream.step(*(array[:, t] for array in drawn))
    mark = stream.snapshot()

    def back() -> Stream:
        stream.restore(mark)
        return stream

    return back


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _frame_loop(
    session: ort.InferenceSession,
    given: Mapping[str, np.ndarray],
    states: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    grow: Collection[str],
) -> Callable[[], np.ndarray]:
    """One frame after the other, as a program in any language would run the stream graph; gives the first output.

    Of the states in `grow` what comes out is left.
    """
    device = device_of(session)
    frames = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()}
    results = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in outputs.items()}
    sets = [{name: ort.OrtValue.ortvalue_from_numpy(value, device) for name, value in states.items()} for _ in range(2)]

    def bind(past: Mapping[str, ort.OrtValue], present: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        binding = session.io_binding()
        for name, value in frames.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in results.items():
            binding.bind_ortvalue_output(name, value)
        for name in past:
            binding.bind_ortvalue_input(name, past[name])
            written = name.replace("past.", "present.", 1)
            if name in grow:
                binding.bind_output(written, device)
            else:
                binding.bind_ortvalue_output(written, present[name])
        return binding

    bindings = [bind(*sets), bind(*sets[::-1])]
    # Others may take a copy when an input is bound, and go on with that.
    reads_in_place = short_name(session.get_providers()[0]) == "cpu"
    turn = 0

    def run() -> np.ndarray:
        nonlocal turn
        binding = bindings[turn] if reads_in_place else bind(*sets[:: 1 - 2 * turn])
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        turn = 1 - turn
        return next(iter(outputs.values()))

    return run
