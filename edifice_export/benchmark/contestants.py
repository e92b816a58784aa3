"""Contestants: what is timed in turn at one point, each with the same input.

    bundle     the bundle's graph, run by ONNX Runtime; of frames in a bare loop, its states in two sets of buffers
    step       a stream's frame as Python programs run it, with its checks

and the bare products that it can't do without, see products, and the alternatives to it, see alternatives.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ..bundle.bundle import Bundle
from ..machine import why_no_torch
from ..runtime.model import Model, load
from ..runtime.providers import device_of, short_name
from .plan import Point

if TYPE_CHECKING:
    from torch import Tensor, nn

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
        reference: the reference model, float32; None without torch.
        frozen: the same with what no input changes as values, as the bundle's graphs have it.
        exact: the reference in float64.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[str]) -> None:
        self.bundle, self.providers = bundle, list(providers)
        self._models: dict[int, Model] = {}
        self.reference: nn.Module | None = None
        if why_no_torch() is None:
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

    def input(self, point: Point) -> np.ndarray:
        """Random frames: float32 [batch, sequence, embed_dim], of a stream [batch, embed_dim]."""
        width = int(self.bundle.manifest.options["embed_dim"])
        shape = (point.batch, width) if point.graph == "stream" else (point.batch, point.length, width)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def forward(model: nn.Module, point: Point, frames: Tensor) -> Callable[[], Tensor]:
    """What gives the output of a torch model, run after run; of a stream, each goes on from the one before."""
    if point.graph == "window":
        return lambda: model(frames)
    state = model.initial_state(point.batch)  # type: ignore[operator]

    def on() -> Tensor:
        nonlocal state
        output, state = model.extend(frames, state)  # type: ignore[operator]
        return output if point.graph == "stream" else output[:, -1]

    return on


def bundle_contestants(subject: Subject, point: Point, frames: np.ndarray) -> list[Contestant]:
    """`bundle`, and of a stream `step`."""
    model = subject.model(point.threads)
    entry = subject.bundle.manifest.graphs[point.graph]
    path, session = subject.bundle.file(entry.model), model.session_of(point.graph)
    inputs = {entry.inputs[0].name: frames}
    if point.graph == "window":
        return [Contestant("bundle", lambda: session.run(None, inputs)[0], path, inputs)]
    inputs |= {f"past.{name}": value for name, value in subject.bundle.initial_state(point.batch).items()}
    stream = model.stream(point.batch, history=0)
    if point.graph == "prefill":
        return [Contestant("bundle", lambda: stream.prefill(frames), path, inputs)]
    loop = _frame_loop(session, inputs, int(entry.outputs[0].shape[1]))
    return [Contestant("bundle", loop, path, inputs), Contestant("step", lambda: stream.step(frames))]


def _frame_loop(
    session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], hidden_size: int
) -> Callable[[], np.ndarray]:
    """One frame after the other, as a program in any language would run the stream graph."""
    device = device_of(session)
    (frame_name, frame), *states = inputs.items()
    output = np.zeros((len(frame), hidden_size), np.float32)
    given, result = ort.OrtValue.ortvalue_from_numpy(frame), ort.OrtValue.ortvalue_from_numpy(output)
    sets = [{name: ort.OrtValue.ortvalue_from_numpy(value, device) for name, value in states} for _ in range(2)]

    def bind(past: Mapping[str, ort.OrtValue], present: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        binding = session.io_binding()
        binding.bind_ortvalue_input(frame_name, given)
        binding.bind_ortvalue_output("output", result)
        for name in past:
            binding.bind_ortvalue_input(name, past[name])
            binding.bind_ortvalue_output(name.replace("past.", "present.", 1), present[name])
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
        return output

    return run
