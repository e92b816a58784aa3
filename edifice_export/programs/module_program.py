"""Somebody's module as a program: the graph that is made of it, and the reference that the graph is held to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.manifest import MODULE, ProgramEntry
from ..errors import RequestError
from ..specification import PAST, InputSpec, Sizes, StateSpec, Values
from ..values import Arrays, draw
from ..weights.checkpoint import hash_tensors
from .module_inputs import Free, input_specs, output_names, why_not, workable_sizes
from .module_stream import ModuleStream, flat, gives_state, has_steps, without_state
from .private_copy import Float64, in_float64, private_copy, unwrapped
from .source import Source

__all__ = ["ModuleProgram"]

_LENGTHS = (1, 2, 3, 5, 7, 13, 23, 37, 61, 131)
"""Sizes that graphs are verified at, besides the example's and about twice that."""

_ENTRIES = (1, 2, 3, 5)
"""The same of the first free size, which is that of a batch as a rule."""

_MAX_NUMBERS = 2**22
"""In one input of those sizes; larger ones are left out."""


class ModuleProgram:
    """See program.Program.

    Args:
        source: the module and what it is called with; it is copied.

    Raises:
        RequestError: see input_specs and workable_sizes; or the module fails on its own example, or gives something
            else than tensors.
    """

    def __init__(self, source: Source) -> None:
        if not isinstance(source.module, nn.Module):
            raise RequestError(f"export takes a torch.nn.Module, got a {type(source.module).__name__}")
        source = dataclasses.replace(source, module=unwrapped(source.module))
        self.private = private_copy(source.module)
        self._inputs, self.free = input_specs(source)
        self._example = [_plain(value, spec) for value, spec in zip(source.args, self._inputs, strict=True)]
        if has_steps(self.private) and gives_state(_called(self.private, self._example, "its example")):
            self.private = without_state(self.private)
        with _looked_up(self.private) as vocabularies:
            found = _run(self.private, self._example, "its example")
        self._inputs = tuple(
            dataclasses.replace(spec, values=Values("ids", vocabularies[value.data_ptr()]))
            if value.data_ptr() in vocabularies and spec.name not in source.values
            else spec
            for spec, value in zip(self._inputs, self._example, strict=True)
        )
        self.names = output_names(source, len(found))
        taken = [*(spec.name for spec in self._inputs), *self.names]
        if len(set(taken)) < len(taken):
            raise RequestError(f"inputs and outputs are called {', '.join(taken)}; give each a name of its own")
        self.entry = ProgramEntry(MODULE, type(source.module).__name__)
        self.example_sizes = {name: each.example for name, each in self.free.items()}
        self._stream = (
            ModuleStream(self.private, self._inputs, self._example, self.names) if has_steps(self.private) else None
        )
        self._traced = workable_sizes(self.private, self._inputs, self.free)

    @property
    def graphs(self) -> tuple[str, ...]:
        """See Program."""
        return ("window", *(self._stream.graphs if self._stream is not None else ()))

    @property
    def frames(self) -> str | None:
        """See Program."""
        return self._stream.frames if self._stream is not None else None

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """See Program."""
        return self._stream.states if self._stream is not None else ()

    @property
    def sizes(self) -> dict[str, int]:
        """See Program; of states that grow, as many frames as the example has."""
        if self._stream is None or not self._stream.grows:
            return self.example_sizes
        return {**self.example_sizes, str(PAST): self.example_sizes[self._stream.frames]}

    @property
    def param_count(self) -> int:
        """Numbers in parameters and buffers, tied ones once."""
        return sum(value.numel() for value in (*self.private.parameters(), *self.private.buffers()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of parameters and buffers with their names: that of another module is another."""
        buffers = self.private.named_buffers(remove_duplicate=False)
        return hash_tensors({**dict(self.private.named_parameters(remove_duplicate=False)), **dict(buffers)})

    def initial_values(self) -> Arrays:
        """See Program."""
        return self._stream.initial_values() if self._stream is not None else {}

    def module(self, graph: str) -> nn.Module:
        """See Program."""
        return self.private if graph == "window" else self.stream.module(graph)

    @property
    def stream(self) -> ModuleStream:
        """How it goes frame by frame."""
        assert self._stream is not None, "a program without stream graphs has no stream"
        return self._stream

    def inputs(self, graph: str) -> tuple[InputSpec, ...]:
        """See Program."""
        if graph == "window":
            return self._inputs
        own = self.stream.inputs if graph == "stream" else self.stream.sequences
        return (*own, *(state.past for state in self.states))

    def outputs(self, graph: str) -> tuple[str, ...]:
        """See Program."""
        if graph == "window":
            return self.names
        return (*self.stream.names, *(state.present().name for state in self.states))

    def limits(self, graph: str) -> dict[str, tuple[int, int | None]]:
        """See Program."""
        there = {symbol for spec in self.inputs(graph) for symbol in spec.symbols}
        limits = {name: (each.least, each.most) for name, each in self.free.items() if name in there}
        return {name: bounds for name, bounds in limits.items() if bounds != (1, None)}

    def traced_sizes(self, graph: str) -> Sequence[Sizes]:
        """See Program."""
        there = {symbol for spec in self.inputs(graph) for symbol in spec.symbols}
        sizes = [{name: size for name, size in sizes.items() if name in there} for sizes in self._traced]
        if str(PAST) not in there:
            return sizes
        taken = {size for each in sizes for size in each.values()}
        first, *others = (past for past in range(5, 5 + len(taken) + len(sizes)) if past not in taken)
        longer = [{**each, str(PAST): past} for each, past in zip(sizes, (first, *others), strict=False)]
        # Code may do something else where there is nothing yet.
        return [*longer, *({**sizes[-1], str(PAST): past} for past in (0, 1))]

    def examples(self, graph: str, generator: np.random.Generator) -> Iterator[tuple[Arrays, Arrays]]:
        """See Program."""
        if graph != "window":
            yield from self.stream.examples(graph, generator, self.exact)
            return
        given = {spec.name: value.numpy() for spec, value in zip(self._inputs, self._example, strict=True)}
        yield given, self._rounded(given)
        if self.free:
            other = self._traced[-1]
            drawn = {spec.name: draw(spec, other, generator) for spec in self._inputs}
            yield drawn, self._rounded(drawn)

    def long_example(self, generator: np.random.Generator) -> tuple[Arrays, Arrays]:
        """See Program."""
        return self.stream.long_example(generator, self.exact)

    def run_stream(
        self,
        frames: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray] | None = None,
        restart: int = 0,
        module: Any = None,
        within: Any = None,
    ) -> Arrays:
        """The outputs at every frame, in float64, and from a state also the states after the last, by tensor names.

        Args:
            frames: [batch, frames, ...] of every input.
            state: before the first; None at the start.
            restart: frames after which entry 0 starts anew; 0 if it never does.
            module: `private`, to compute in float32.
            within: a context to compute in.
        """
        module = self.exact if module is None else module
        outputs, after = self.stream.run(frames, state, module, within)
        if restart:
            late = {name: array[:1, restart:] for name, array in frames.items()}
            fresh, _ = self.stream.run(late, None, module, within)
            outputs = {name: array.copy() for name, array in outputs.items()}
            for name, array in fresh.items():
                outputs[name][:1, restart:] = array
        present = {f"present.{name}": value for name, value in after.items()} if state is not None else {}
        return {**outputs, **present}

    def parameters(self) -> Arrays:
        """See Program."""
        held = {**dict(self.private.named_parameters()), **dict(self.private.named_buffers())}
        return {name: value.detach().numpy() for name, value in held.items()}

    def reference_metadata(self) -> None:
        """See Program."""
        return

    @functools.cached_property
    def exact(self) -> nn.Module:
        """The module in float64."""
        return in_float64(self.private)

    def run(self, inputs: Mapping[str, np.ndarray], module: nn.Module | None = None, within: Any = None) -> Arrays:
        """What the module gives, by name.

        Args:
            inputs: by name.
            module: a copy of it, in float64; or `private`, which computes in float32.
            within: a context to compute in.

        Raises:
            RequestError: it fails on these inputs.
        """
        module = self.exact if module is None else module
        given = [torch.tensor(inputs[spec.name]) for spec in self._inputs]
        sizes = ", ".join(f"{spec.name} {list(value.shape)}" for spec, value in zip(self._inputs, given, strict=True))
        if module is not self.private:
            within = Float64()
            given = [value.double() if value.is_floating_point() else value for value in given]
        with within or contextlib.nullcontext():
            found = _run(module, given, sizes)
        return {name: value.numpy() for name, value in zip(self.names, found, strict=True)}

    def verified_sizes(self, every: bool = False) -> list[Sizes]:
        """Sizes to verify at: all 1, those of the example and beyond, and others of which none was traced.

        Args:
            every: besides, every size from 1 to the example's, one after the other.
        """
        free = list(self.free.items())
        found: list[dict[str, int]] = [
            {
                name: _within(each, _LENGTHS[(index * (1 + 2 * place)) % len(_LENGTHS)] if place else _entries(index))
                for place, (name, each) in enumerate(free)
            }
            for index in range(len(_LENGTHS))
        ]
        found.append({name: _within(each, 1) for name, each in free})
        found.append({name: each.example for name, each in free})
        found.append({name: _within(each, 2 * each.example + 1) for name, each in free})
        # Some take multiples alone.
        found += [{name: _within(each, times * each.example) for name, each in free} for times in (2, 3, 5)]
        if every:
            for name, each in free:
                found += [{**self.example_sizes, name: _within(each, size)} for size in range(1, each.example + 1)]
        several = [dict(items) for items in dict.fromkeys(tuple(sizes.items()) for sizes in found)]
        return [sizes for sizes in several if sizes == self.example_sizes or self._bears(sizes)]

    def _bears(self, sizes: Sizes) -> bool:
        """Whether it takes inputs of these sizes itself, and they are not too large to try."""
        counts = [math.prod(size or 1 for size in spec.at(sizes)) for spec in self._inputs]
        return max(counts) <= _MAX_NUMBERS and why_not(self.private, self._inputs, sizes) is None

    def _rounded(self, given: Arrays) -> Arrays:
        """What the module gives in float64, in the types that its graph gives."""
        example = _run(self.private, [torch.from_numpy(value) for value in given.values()], "an example")
        exact = self.run(given)
        return {name: exact[name].astype(value.numpy().dtype) for name, value in zip(self.names, example, strict=True)}


@contextlib.contextmanager
def _looked_up(module: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, how many rows there are in an embedding, by where in memory what is looked up in it lies."""
    found: dict[int, int] = {}

    def note(embedding: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(embedding, nn.Embedding):
            place = given[0].data_ptr()
            found[place] = min(found.get(place, embedding.num_embeddings), embedding.num_embeddings)

    hooks = [part.register_forward_pre_hook(note) for part in module.modules() if isinstance(part, nn.Embedding)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _plain(value: Any, spec: InputSpec) -> Tensor:
    """An example as the graph takes it: on the CPU, in memory of its own."""
    tensor: Tensor = value.detach().to("cpu", getattr(torch, spec.dtype))
    return tensor.clone().contiguous()


def _entries(index: int) -> int:
    return _ENTRIES[index % len(_ENTRIES)]


def _within(free: Free, size: int) -> int:
    return min(max(size, free.least), free.most if free.most is not None else size)


def _called(module: nn.Module, given: Sequence[Tensor], what: str) -> Any:
    """Whatever a module gives."""
    try:
        with torch.no_grad():
            return module(*given)
    except Exception as error:  # whatever somebody's code raises
        raise RequestError(f"{type(module).__name__} fails on {what}: {type(error).__name__}: {error}") from error


def _run(module: nn.Module, given: Sequence[Tensor], what: str) -> tuple[Tensor, ...]:
    """The tensors that a module gives."""
    found = _called(module, given, what)
    outputs = flat(found)
    if outputs is None:
        raise RequestError(
            f"{type(module).__name__} gives a {type(found).__name__}; return a tensor or a flat tuple of tensors"
        )
    return outputs
