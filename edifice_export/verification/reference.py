"""Reference: what a bundle's graphs are held to, made again from an architecture's weights, or of somebody's module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from edifice_reference.models.contract import ReferenceModel

from ..bundle.bundle import Bundle
from ..programs.freeze import freeze
from ..programs.graphs import entry
from ..programs.module_program import ModuleProgram
from ..programs.private_copy import in_float64
from ..programs.reference_model import reference_of
from .report import Given

__all__ = ["ArchitectureReference", "Float32", "ModuleReference", "Outputs", "Reference"]

Outputs = dict[str, Tensor]
"""By name, of several copies of what was given, one after the other in the first axis."""

Context = AbstractContextManager[Any]
Watch = Callable[[nn.Module, tuple[Any, ...], Any], None]
"""A forward hook."""

M = TypeVar("M")

_AT_ONCE = 16
_MAX_PAIRS = 2**20
"""Samples that are computed at once, in one batch; the most pairs of frames in it, for memory."""


class Float32(Protocol):
    """A float32 computation of what was given, beside the one in float64."""

    def errors(self, rounding: Context | None = None) -> Outputs:
        """Errors [K, ...] of K samples, computed within a context that rounds at random; without one, as it is."""


class Reference(Protocol):
    """What is asked of a reference beside its outputs."""

    @property
    def title(self) -> str:
        """What reports call it."""

    def stream(self, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs at every frame of a stream from its start, in float64, by name."""

    def bears(self, frames: dict[str, np.ndarray]) -> bool:
        """Whether a stream of these frames is one that float32 must not overflow on."""

    def float32(self, graph: str, given: Given) -> Float32:
        """The same computation in float32."""

    def run(self, graph: str, given: Given, watch: Watch) -> None:
        """Computes in float64, with a forward hook on every module."""

    def feeds(self, graph: str, given: Given) -> dict[str, np.ndarray]:
        """What a graph takes to give what was compared last."""

    def module(self, graph: str) -> nn.Module:
        """The float64 module whose forward a graph computes."""


class ArchitectureReference:
    """See Reference.

    Attributes:
        model: in float64.

    Raises:
        CheckError: see reference_of.
    """

    title = "float64 reference"

    def __init__(self, bundle: Bundle) -> None:
        self._float32 = reference_of(bundle)
        self.model = copy.deepcopy(self._float32).double()

    def stream(self, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Reference."""
        (sequence,) = frames.values()
        with torch.no_grad():
            return {"output": self.model.forward_stream(torch.from_numpy(sequence).double()).numpy()}

    def bears(self, frames: dict[str, np.ndarray]) -> bool:  # noqa: ARG002
        """See Reference."""
        return True

    def float32(self, graph: str, given: Given) -> Float32:
        """See Reference."""
        return _Float32Architecture(self._float32, self.model, graph, given)

    def run(self, graph: str, given: Given, watch: Watch) -> None:
        """See Reference."""
        watched = _watched(self.model, watch)
        with torch.no_grad():
            (watched if graph == "window" else watched.forward_stream)(torch.tensor(given.frames).double())

    def feeds(self, graph: str, given: Given) -> dict[str, np.ndarray]:
        """See Reference."""
        sequence = given.frames
        if graph == "window":
            return {"state_sequence": sequence}
        state = self.model.initial_state(sequence.shape[0])
        if graph == "stream" and sequence.shape[1] > 1:
            with torch.no_grad():
                _, state = self.model.extend(torch.tensor(sequence[:, :-1]).double(), state)
        carried = {
            f"past.{key}": (value.float() if value.is_floating_point() else value).detach().numpy()
            for key, value in state.items()
        }
        return {**({"frame": sequence[:, -1]} if graph == "stream" else {"state_sequence": sequence}), **carried}

    def module(self, graph: str) -> nn.Module:
        """See Reference."""
        return entry(self.model, graph)


class ModuleReference:
    """See Reference.

    Attributes:
        program: the module.
    """

    title = "float64 module"

    def __init__(self, program: ModuleProgram) -> None:
        self.program = program

    def stream(self, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Reference."""
        outputs: dict[str, np.ndarray] = self.program.run_stream(frames)
        return outputs

    def bears(self, frames: dict[str, np.ndarray]) -> bool:
        """See Reference."""
        outputs = self.program.run_stream(frames, module=self.program.private)
        return all(bool(np.isfinite(value).all()) for value in outputs.values())

    def float32(self, graph: str, given: Given) -> Float32:
        """See Reference."""
        return _Float32Module(self.program, graph, given)

    def run(self, graph: str, given: Given, watch: Watch) -> None:
        """See Reference."""
        watched = _watched(self.program.exact, watch)
        if graph == "window":
            self.program.run(given.inputs, module=watched)
        else:
            self.program.run_stream(given.inputs, given.state, given.restart, watched)

    def feeds(self, graph: str, given: Given) -> dict[str, np.ndarray]:
        """See Reference."""
        if graph == "window":
            return dict(given.inputs)
        stream, frames, state = self.program.stream, dict(given.inputs), given.state
        if graph == "stream":
            before = {name: array[:, :-1] for name, array in frames.items()}
            if next(iter(before.values())).shape[1]:
                _, state = stream.run(before, state, self.program.exact)
            frames = {name: array[:, -1] for name, array in frames.items()}
        state = stream.start(given.frames.shape[0]) if state is None else state
        return {**frames, **{f"past.{each.name}": state[each.name].astype(each.dtype) for each in stream.states}}

    def module(self, graph: str) -> nn.Module:
        """See Reference."""
        return in_float64(self.program.module(graph))


def _watched(model: M, watch: Watch) -> M:
    model = copy.deepcopy(model)
    assert isinstance(model, nn.Module)
    for module in model.modules():
        module.register_forward_hook(watch)
    return model


class _Float32Architecture:
    """What depends on no input is finished and rounded once, as in a graph."""

    def __init__(self, model: ReferenceModel, exact: ReferenceModel, graph: str, given: Given) -> None:
        self._model, self._graph, self._given = freeze(model), graph, given
        self._exact = self._outputs(exact, 1, torch.float64)

    def errors(self, rounding: Context | None = None) -> Outputs:
        """See Float32."""
        if rounding is None:
            found = self._outputs(self._model, 1, torch.float32)
        else:
            batch, length = self._given.frames.shape[:2]
            with rounding:
                count = max(1, min(_AT_ONCE, _MAX_PAIRS // (batch * length**2)))
                found = self._outputs(self._model, count, torch.float32)
        return {name: _difference(value, self._exact[name]) for name, value in found.items()}

    def _outputs(self, model: ReferenceModel, count: int, dtype: torch.dtype) -> Outputs:
        """What a model gives for so many copies, one after the other in the batch."""

        def several(array: np.ndarray) -> Tensor:
            value = torch.tensor(array).repeat(count, *[1] * (array.ndim - 1))
            return value.to(dtype) if value.is_floating_point() else value

        frames, state = self._given.frames, self._given.state
        before = {name: several(value) for name, value in state.items()} if state is not None else None
        with torch.no_grad():
            return _outputs_of(model, self._graph, self._given, several(frames), before)


def _difference(found: Tensor, exact: Tensor) -> Tensor:
    """What is not finite excuses nothing."""
    return torch.nan_to_num(found.reshape(-1, *exact.shape).double() - exact, 0, 0, 0)


def _outputs_of(model: ReferenceModel, graph: str, given: Given, frames: Tensor, state: Outputs | None) -> Outputs:
    """What a graph should give: `output` at every frame of a stream [B, T, D], at the last of a window [B, 1, D].

    Args:
        model: the reference, of the precision of frames and state.
        graph: one of manifest.GRAPHS.
        given: says where entries were restarted.
        frames: [B, T, E]. B may be a multiple of what was given.
        state: before the first of them; None at the start of a stream.
    """
    if graph == "window":
        return {"output": model(frames)[:, None]}
    if state is not None:
        output, after = model.extend(frames, state)
        return {"output": output, **{f"present.{name}": value for name, value in after.items()}}
    output = model.forward_stream(frames)
    if given.restart:
        firsts = slice(None, None, given.frames.shape[0])
        output = output.clone()
        output[firsts, given.restart :] = model.forward_stream(frames[firsts, given.restart :])
    return {"output": output}


class _Float32Module:
    def __init__(self, program: ModuleProgram, graph: str, given: Given) -> None:
        self._program, self._graph, self._given = program, graph, given
        self._exact = self._outputs(None, None)

    def _outputs(self, module: nn.Module | None, within: Context | None) -> dict[str, np.ndarray]:
        given = self._given
        if self._graph == "window":
            return self._program.run(given.inputs, module, within)
        return self._program.run_stream(given.inputs, given.state, given.restart, module, within)

    def errors(self, rounding: Context | None = None) -> Outputs:
        """See Float32."""
        found = self._outputs(self._program.private, rounding)
        return {
            name: _difference(torch.from_numpy(value), torch.from_numpy(self._exact[name]).double())
            for name, value in found.items()
        }
