"""Somebody's module that goes frame by frame: its `step` and `initial_state` as graphs with explicit states."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RequestError
from ..specification import PAST, InputSpec, Size, StateSpec, Values
from ..values import Arrays, draw
from .graphs import State, carry_states, state_specs, values_in_files
from .private_copy import Float64

__all__ = ["ModuleStream", "flat", "gives_state", "has_steps", "without_state"]

_WINDOWS = 2.5
"""Length of a stream's longer test, in those of the example."""

_STATES = (torch.float32, torch.int64, torch.int32)


def has_steps(module: nn.Module) -> bool:
    """Whether a module says how it goes frame by frame."""
    return callable(getattr(module, "step", None)) and callable(getattr(module, "initial_state", None))


def without_state(module: nn.Module) -> nn.Module:
    """A module whose forward gives a state after its outputs, as one that gives the outputs alone; it is changed."""

    def forward(self: Any, *given: Tensor) -> Any:
        return type(self).forward(self, *given)[0]

    object.__setattr__(module, "forward", types.MethodType(forward, module))
    return module


def gives_state(found: Any) -> bool:
    """Whether what forward gave is outputs and a state."""
    return isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)


def flat(found: Any) -> tuple[Tensor, ...] | None:
    """The tensors that somebody's code gave, None where it gave something else."""
    outputs = (found,) if isinstance(found, Tensor) else tuple(found) if isinstance(found, (tuple, list)) else ()
    return outputs if outputs and all(isinstance(value, Tensor) for value in outputs) else None


class ModuleStream:
    """The stream and prefill graphs of a module.

    `initial_state(batch)` gives a dict of tensors [batch, ...]; `step(*frame, state)` the outputs of a frame and the
    state after it; `extend(*frames, state)`, or `forward(*frames, state)`, the same of several frames at once, with the
    outputs at each. A state in which `initial_state` gives an axis a size of 0 grows by one there with every frame.

    Args:
        module: a private copy.
        inputs: of its window graph: [batch, frames, ...] each, where the first two are free.
        example: of each, a tensor.
        names: of the window graph's outputs.

    Raises:
        RequestError: inputs are not of that form, the states are not tensors of one shape and type, or it fails.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[InputSpec], example: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        self._module: Any = module
        self.sequences = tuple(inputs)
        self.batch, self.frames = self._axes()
        self._window = example[0].shape[1]
        self.inputs = tuple(_of_a_frame(spec) for spec in inputs)
        self._initial = self._start(1)
        self.states = state_specs(self._initial, Size((self.batch,)))
        self._check_entries()
        outputs = self._check_step([value[:, 0] for value in example])
        several = len(outputs) == len(names) or len(outputs) == 1
        self.names = tuple(names[: len(outputs)]) if several else tuple(f"output_{i}" for i in range(len(outputs)))
        own = (*(spec.name for spec in inputs), *self.names)
        odd = [name for name in own if name.startswith(("past.", "present."))]
        if self.grows and str(PAST) in {symbol for spec in inputs for symbol in spec.symbols}:
            raise self._error(f"a size is called {PAST}, as that of states which grow; give it another name")
        if odd:
            raise self._error(f"{odd[0]} is called as states are in its stream; give it another name")
        self.extends = self._way_to_extend()

    @property
    def grows(self) -> bool:
        """Whether a state is longer after every frame."""
        return any(state.grows for state in self.states)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Those that there are: prefill needs a way to take several frames at once."""
        return ("stream", "prefill") if self.extends is not None else ("stream",)

    def module(self, graph: str) -> nn.Module:
        """The module whose forward takes frames and states as tensors, and gives outputs and states."""
        shared = {id(tensor): tensor for tensor in (*self._module.parameters(), *self._module.buffers())}
        mine = copy.deepcopy(self._module, shared)
        extends = self.extends

        def run(module: Any, frames: Sequence[Tensor], past: State) -> tuple[Sequence[Tensor], State]:
            own_forward = types.MethodType(type(module).forward, module)  # and not the one that calls this
            ways = {"extend": getattr(module, "extend", None), "forward": own_forward}
            way = module.step if graph == "stream" else ways[str(extends)]
            outputs, present = _with_state(way, frames, past)
            return flat(outputs) or (), present

        return carry_states(mine, run, [state.name for state in self.states], last=graph == "prefill")

    def initial_values(self) -> Arrays:
        """Of states that no single number fills, what one entry starts from."""
        return values_in_files(self.states, self._initial)

    def start(self, batch: int) -> Arrays:
        """The states before the first frame."""
        return {name: value.numpy() for name, value in self._start(batch).items()}

    def run(
        self, frames: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray] | None, module: Any, within: Any = None
    ) -> tuple[Arrays, Arrays]:
        """The outputs at every frame, step by step, and the state after the last.

        Args:
            frames: [batch, frames, ...] of every input.
            state: before the first; None at the start.
            module: computes them; the private copy in float32, or one in float64.
            within: a context to compute in.
        """
        exact = module is not self._module
        given = [torch.tensor(frames[spec.name]) for spec in self.inputs]
        batch, length = given[0].shape[:2]
        with torch.no_grad(), Float64() if exact else within or contextlib.nullcontext():
            before = module.initial_state(batch) if state is None else _tensors(state)
            if exact:
                given, before = [_double(value) for value in given], {k: _double(v) for k, v in before.items()}
            found: list[tuple[Tensor, ...]] = []
            for t in range(length):
                try:
                    outputs, before = _with_state(module.step, [value[:, t] for value in given], before)
                except Exception as error:  # whatever somebody's code raises
                    raise self._error(
                        f"step fails on frame {t + 1} of {length}: {type(error).__name__}: {error}; a stream has no "
                        "end: let it take any number of frames"
                    ) from error
                found.append(flat(outputs) or ())
        stacked = (torch.stack(each, dim=1).numpy() for each in zip(*found, strict=True))
        after = {state.name: before[state.name].numpy() for state in self.states}
        return dict(zip(self.names, stacked, strict=True)), after

    def draw(self, generator: np.random.Generator, batch: int, length: int) -> Arrays:
        """Random frames [batch, frames, ...] of every input."""
        return {spec.name: draw(spec.framed(length, batch), {}, generator) for spec in self.inputs}

    def examples(self, graph: str, generator: np.random.Generator, exact: Any) -> Iterator[tuple[Arrays, Arrays]]:
        """Data sets of a graph, each from the state after the one before, as it was written."""
        lengths = (1, 1, 1) if graph == "stream" else (self._window + 2, (self._window + 1) // 2)
        state = self.start(2)
        if self.grows and graph == "stream":  # a fourth, from as many frames as there are in a window
            lengths = (*lengths, 1)
        for index, length in enumerate(lengths):
            if index == 3:
                _, later = self.run(self.draw(generator, 2, self._window), state, exact)
                state = {each.name: later[each.name].astype(each.dtype) for each in self.states}
            frames = self.draw(generator, 2, length)
            outputs, after = self.run(frames, state, exact)
            present = {state.name: after[state.name].astype(state.dtype) for state in self.states}
            given = {name: array[:, 0] if graph == "stream" else array for name, array in frames.items()}
            last = {name: _single(array[:, -1]) for name, array in outputs.items()}
            yield (
                {**given, **{f"past.{name}": value for name, value in state.items()}},
                {**last, **{f"present.{name}": value for name, value in present.items()}},
            )
            state = present

    def long_example(self, generator: np.random.Generator, exact: Any) -> tuple[Arrays, Arrays]:
        """Frames from the start, several times the example's, and the outputs at each."""
        frames = self.draw(generator, 1, math.ceil(_WINDOWS * self._window))
        outputs, _ = self.run(frames, None, exact)
        return frames, {name: _single(array) for name, array in outputs.items()}

    def _axes(self) -> tuple[str, str]:
        """The symbols of the batch and of frames."""
        firsts = {spec.shape[:2] for spec in self.sequences}
        free = [size.symbol for size in next(iter(firsts)) if isinstance(size, Size)] if len(firsts) == 1 else []
        if len(free) != 2 or free[0] is None or free[1] is None:
            raise RequestError(
                f"{type(self._module).__name__} has step and initial_state, so that its inputs are [batch, frames, "
                f"...], both free; they are {', '.join(map(str, self.sequences))}; declare them in dynamic_shapes"
            )
        return free[0], free[1]

    def _start(self, batch: int) -> State:
        try:
            with torch.no_grad():
                state = self._module.initial_state(batch)
        except Exception as error:  # whatever somebody's code raises
            raise self._error(f"initial_state({batch}) fails: {type(error).__name__}: {error}") from error
        if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
            raise self._error("initial_state gives no dict of tensors; give each tensor of the state a name")
        odd = [name for name in state if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) < 99]
        if odd:
            raise self._error(f"initial_state calls a tensor {odd[0]!r:.60}; give names of 1 to 98 printable letters")
        found = {name: value.detach().contiguous() for name, value in state.items()}
        for name, value in found.items():
            if value.dtype in (torch.int64, torch.int32) and bool((value < 0).any()):
                raise self._error(f"initial_state gives {name} negative integers; let it start from 0 or above")
            if value.shape[1:].count(0) > 1:
                raise self._error(
                    f"initial_state gives {name} as {list(value.shape)}; one axis can grow, from a size of 0"
                )
            if value.dtype not in _STATES or not value.dim() or value.shape[0] != batch:
                raise self._error(
                    f"initial_state({batch}) gives {name} as {str(value.dtype).removeprefix('torch.')} "
                    f"{list(value.shape)}; a state is float32, int64 or int32, and its first axis the batch"
                )
        return found

    def _check_entries(self) -> None:
        """Refuses states that are not the same for every entry of a batch."""
        for name, value in self._start(2).items():
            if name not in self._initial or not torch.equal(value, self._initial[name].expand_as(value)):
                raise self._error(f"initial_state(2) gives another {name} than initial_state(1); entries start alike")

    def _check_step(self, frame: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of a step; refuses one that leaves other states than it was given."""
        state, found = self._start(len(frame[0])), None
        for past in (1, 2):
            try:
                with torch.no_grad():
                    outputs, state = _with_state(self._module.step, frame, dict(state))
            except Exception as error:  # whatever somebody's code raises
                raise self._error(
                    f"step fails on frame {past} of the example: {type(error).__name__}: {error}"
                ) from error
            found = flat(outputs)
            if found is None or not isinstance(state, dict) or state.keys() != self._initial.keys():
                raise self._error("step should give a tensor or a flat tuple of them, and a state of the same names")
            for spec in self.states:
                self._check_after(spec, past, state[spec.name], len(frame[0]))
        return found or ()

    def _check_after(self, spec: StateSpec, past: int, value: Any, batch: int) -> None:
        """Refuses a state that after so many frames is not as it should be."""
        wanted, dtype = list(spec.of(batch, past)), getattr(torch, spec.dtype)
        if isinstance(value, Tensor) and (list(value.shape), value.dtype) == (wanted, dtype):
            return
        before = list(spec.of(batch, past - 1))
        found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise self._error(
            f"step makes of the state {spec.name} {before} {dtype} {found}; a state keeps its shape and type, or has "
            "one axis that initial_state gives a size of 0 and each step makes one longer".replace("torch.", "")
        )

    def _way_to_extend(self) -> str | None:
        if callable(getattr(self._module, "extend", None)):
            return "extend"
        takes_state = "state" in inspect.signature(type(self._module).forward).parameters
        return "forward" if takes_state else None

    def _error(self, problem: str) -> RequestError:
        return RequestError(f"{type(self._module).__name__}: {problem}")


def _with_state(function: Any, frames: Sequence[Tensor], state: State) -> Any:
    """Calls what takes frames and a state, which comes last or by name."""
    parameter = inspect.signature(function).parameters.get("state")
    if parameter is not None and parameter.kind is parameter.KEYWORD_ONLY:
        return function(*frames, state=state)
    return function(*frames, state)


def _of_a_frame(spec: InputSpec) -> InputSpec:
    shape = (spec.shape[0], *spec.shape[2:])
    # Of a mask along the frames, one frame is one number.
    values = Values("integers", 2) if spec.values.kind == "mask" else spec.values
    return dataclasses.replace(spec, shape=shape, values=values)


def _single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _tensors(state: Mapping[str, np.ndarray]) -> State:
    return {name: torch.tensor(value) for name, value in state.items()}


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
