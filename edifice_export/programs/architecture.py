"""An architecture with its weights as a program."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from edifice_reference.models.contract import ReferenceModel

from ..bundle.manifest import ARCHITECTURE, ProgramEntry
from ..specification import BATCH, SEQUENCE, InputSpec, OutputSpec, StateSpec
from ..values import Arrays
from ..weights import own_metadata
from .graphs import entry, signature, state_specs, values_in_files

__all__ = ["ArchitectureProgram"]

_STEPS = 3
"""Frames of a stream that have a data set each."""

_MAX_BYTES = 2**26
"""Most bytes of all data sets of a graph with states, but for the first, which is always there."""

_WINDOWS = 2.5
"""Length of a stream's longer test."""


class ArchitectureProgram:
    """See program.Program.

    Args:
        name: of the architecture.
        model: the reference model, float32.
        graphs: those of manifest.GRAPHS that are to be made.
    """

    def __init__(self, name: str, model: ReferenceModel, graphs: tuple[str, ...]) -> None:
        self.model = model
        self.graphs = graphs
        self.config = model.config
        self.entry = ProgramEntry(ARCHITECTURE, name, self.config.options(), self.model.numerics)
        self.sizes: dict[str, int] = {str(BATCH): 1, str(SEQUENCE): self.config.window_size}
        self.frames: str | None = str(SEQUENCE)
        self.param_count = sum(parameter.numel() for parameter in model.parameters())
        self._start = _rounded(self._exact.initial_state(1)) if "stream" in graphs else {}
        self.states: tuple[StateSpec, ...] = state_specs(self._start)

    @functools.cached_property
    def _exact(self) -> ReferenceModel:
        return copy.deepcopy(self.model).double()

    def initial_values(self) -> Arrays:
        """See Program."""
        return values_in_files(self.states, self._start)

    def module(self, graph: str) -> nn.Module:
        """See Program."""
        return entry(self.model, graph)

    def inputs(self, graph: str) -> tuple[InputSpec, ...]:
        """See Program."""
        return signature(graph, self.config.embed_dim, self.config.output_size, self.states)[0]

    def outputs(self, graph: str) -> tuple[OutputSpec, ...]:
        """See Program."""
        return signature(graph, self.config.embed_dim, self.config.output_size, self.states)[1]

    def limits(self, graph: str) -> dict[str, tuple[int, int | None]]:
        """See Program."""
        return {str(SEQUENCE): (1, self.config.window_size)} if graph == "window" and self.config.window_binds else {}

    def traced_sizes(self, graph: str) -> None:  # noqa: ARG002
        """See Program."""
        return

    def examples(self, graph: str, generator: np.random.Generator) -> Iterator[tuple[Arrays, Arrays]]:
        """See Program."""
        window, half = self.config.window_size, (self.config.window_size + 1) // 2
        if graph == "window":
            # A whole window and, in a batch of two, half of one.
            for batch, length in ((1, window), (2, half)):
                sequence = self._sequence(generator, batch, length)
                with torch.no_grad():
                    output = self._exact(torch.from_numpy(sequence).double()).float().numpy()
                yield {"state_sequence": sequence}, {"output": output}
        elif graph == "stream":
            # The first frames of a batch of two, each from the state before it.
            frames = self._sequence(generator, 2, _STEPS)
            yield from self._pieces("frame", [frames[:, index] for index in range(self._sets(_STEPS))])
        else:
            # A history of more than a window in a batch of two, and a piece that goes on from its state.
            lengths = (window + 2, half)[: self._sets(2)]
            yield from self._pieces("state_sequence", [self._sequence(generator, 2, length) for length in lengths])

    def long_example(self, generator: np.random.Generator) -> tuple[Arrays, Arrays]:
        """See Program."""
        frames = self._sequence(generator, 1, math.ceil(_WINDOWS * self.config.window_size))
        with torch.no_grad():
            outputs = self._exact.forward_stream(torch.from_numpy(frames).double()).float().numpy()
        return {"frame": frames}, {"output": outputs}

    def parameters(self) -> Arrays:
        """See Program."""
        return {name: value.detach().numpy() for name, value in sorted(self.model.named_parameters())}

    def reference_metadata(self) -> dict[str, str]:
        """See Program."""
        return own_metadata(self.entry.name, self.entry.options, str(self.entry.numerics))

    def _pieces(self, name: str, pieces: list[np.ndarray]) -> Iterator[tuple[Arrays, Arrays]]:
        """Data sets of a graph with states, each from the state after the one before, as it was written."""
        state = _rounded(self._exact.initial_state(2))
        for frames in pieces:
            exact = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
            with torch.no_grad():
                outputs, after = self._exact.extend(torch.from_numpy(frames).double(), exact)
            output = outputs if frames.ndim == 2 else outputs[:, -1]
            given = {f"past.{key}": value.numpy() for key, value in state.items()}
            state = _rounded(after)
            present = {f"present.{key}": value.numpy() for key, value in state.items()}
            yield {name: frames, **given}, {"output": output.float().numpy(), **present}

    def _sequence(self, generator: np.random.Generator, batch: int, length: int) -> np.ndarray:
        return generator.standard_normal((batch, length, self.config.embed_dim)).astype(np.float32)

    def _sets(self, wanted: int) -> int:
        """How many data sets there is room for."""
        size = sum(8 * math.prod(state.of(1)) for state in self.states)
        return max(1, min(wanted, _MAX_BYTES // (2 * size)))


def _rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.float() if value.is_floating_point() else value).detach().contiguous()
        for name, value in state.items()
    }
