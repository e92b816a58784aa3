"""Program: what is exported. The modules of its graphs, what goes into them and what comes out, and its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..bundle.manifest import ProgramEntry
from ..specification import InputSpec, OutputSpec, Sizes, StateSpec
from ..values import Arrays

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Program"]


class Program(Protocol):
    """What is exported: an architecture with its weights, or somebody's module."""

    @property
    def entry(self) -> ProgramEntry:
        """What a manifest says of it."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that are to be made, of manifest.GRAPHS, in their order."""

    @property
    def sizes(self) -> dict[str, int]:
        """What free sizes are made for, by symbol."""

    @property
    def frames(self) -> str | None:
        """The symbol of frames, None where there are none."""

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What a stream carries from frame to frame; none without one."""

    @property
    def param_count(self) -> int:
        """Numbers in the weights of its reference."""

    def initial_values(self) -> Arrays:
        """Of states that no single number fills, what one entry starts from."""

    def module(self, graph: str) -> nn.Module:
        """The module whose forward takes the inputs of a graph, states last, and gives its outputs."""

    def inputs(self, graph: str) -> tuple[InputSpec, ...]:
        """What a graph takes."""

    def outputs(self, graph: str) -> tuple[OutputSpec, ...] | tuple[str, ...]:
        """What a graph gives; the names alone where a trace has to tell the rest."""

    def limits(self, graph: str) -> dict[str, tuple[int, int | None]]:
        """Free sizes of a graph that can't be any number: the least, and the most or None."""

    def traced_sizes(self, graph: str) -> Sequence[Sizes] | None:
        """Sizes to trace a graph at, and others to compare at; None where any will do."""

    def examples(self, graph: str, generator: np.random.Generator) -> Iterator[tuple[Arrays, Arrays]]:
        """Test data sets of a graph: inputs, and what the reference makes of them in float64, rounded."""

    def long_example(self, generator: np.random.Generator) -> tuple[Arrays, Arrays] | None:
        """A longer test of the stream from its start: frames [batch, frames, ...] and the outputs at each, if any."""

    def parameters(self) -> Arrays:
        """What the module holds, parameters and buffers, each once; no copies. Graphs hold these or what follows."""

    def reference_metadata(self) -> dict[str, str] | None:
        """What a file of the parameters says beside them, from which the reference is made again; None of somebody's
        module, which no file makes.
        """
