"""The test data of a bundle: inputs and what the float64 reference makes of them, rounded."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import write_tensor, write_test_data
from ..bundle.manifest import GraphEntry, SequenceEntry
from ..specification import BATCH, SEQUENCE, StateSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["write_all_test_data"]

_STEPS = 3
"""Frames of a stream that have a data set each."""

_MAX_BYTES = 2**26
"""Most bytes of all data sets of a graph with states, but for the first, which is always there."""

_WINDOWS = 2.5
"""Length of a stream's longer test."""


def write_all_test_data(
    folder: Path, model: nn.Module, graphs: Sequence[str], seed: int
) -> tuple[tuple[StateSpec, ...], dict[str, GraphEntry]]:
    """Writes the test data of graphs, and the initial states that have no constant value.

    Args:
        folder: of the bundle.
        model: the reference, float32.
        graphs: names of manifest.GRAPHS.
        seed: of the inputs.

    Returns:
        The states, none without a stream, and each graph's entry in the manifest.
    """
    writer = _Writer(folder, copy.deepcopy(model).double(), graphs, seed)
    return writer.states, {name: getattr(writer, f"write_{name}")() for name in graphs}


class _Writer:
    def __init__(self, folder: Path, reference: Any, graphs: Sequence[str], seed: int) -> None:
        from ..programs.graphs import state_specs

        self.folder, self.reference, self.config = folder, reference, reference.config
        self.generator = np.random.default_rng(seed)
        self.states: tuple[StateSpec, ...] = ()
        if "stream" in graphs:
            initial = self.rounded(reference.initial_state(1))
            self.states = state_specs(initial, "stream/initial")
            for state in self.states:
                if isinstance(state.initial, str):
                    write_tensor(folder / state.initial, state.name, initial[state.name].numpy())

    def write_window(self) -> GraphEntry:
        """A whole window and, in a batch of two, half of one."""
        import torch

        window, paths = self.config.window_size, []
        for index, (batch, length) in enumerate(((1, window), (2, (window + 1) // 2))):
            sequence = self.sequence(batch, length)
            with torch.no_grad():
                output = self.reference(torch.from_numpy(sequence).double()).float().numpy()
            paths.append(f"window/test_data_set_{index}")
            write_test_data(self.folder / paths[-1], {"state_sequence": sequence}, {"output": output})
        return self.entry("window", paths, window if self.config.window_binds else None)

    def write_stream(self) -> GraphEntry:
        """The first frames of a batch of two, each from the state before it, and a stream of several windows."""
        frames = self.sequence(2, _STEPS)
        state, paths = self.reference.initial_state(2), []
        for index in range(self.sets(_STEPS)):
            paths.append(f"stream/test_data_set_{index}")
            state = self.write_piece(paths[-1], "frame", frames[:, index], state)
        return self.entry("stream", paths, test_sequence=self.write_test_sequence())

    def write_prefill(self) -> GraphEntry:
        """A history of more than a window in a batch of two, and a piece that goes on from its state."""
        window = self.config.window_size
        state, paths = self.reference.initial_state(2), []
        for index, length in enumerate((window + 2, (window + 1) // 2)[: self.sets(2)]):
            paths.append(f"prefill/test_data_set_{index}")
            state = self.write_piece(paths[-1], "state_sequence", self.sequence(2, length), state)
        return self.entry("prefill", paths)

    def write_piece(self, path: str, name: str, frames: np.ndarray, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """One data set of a graph with states; returns the state after it, as it was written."""
        import torch

        given = self.rounded(state)
        exact = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
        with torch.no_grad():
            outputs, after = self.reference.extend(torch.from_numpy(frames).double(), exact)
        output = outputs if frames.ndim == 2 else outputs[:, -1]
        inputs = {name: frames, **{f"past.{key}": value.numpy() for key, value in given.items()}}
        present = {f"present.{key}": value.numpy() for key, value in self.rounded(after).items()}
        write_test_data(self.folder / path, inputs, {"output": output.float().numpy(), **present})
        return self.rounded(after)

    def write_test_sequence(self) -> SequenceEntry:
        import torch

        frames = self.sequence(1, math.ceil(_WINDOWS * self.config.window_size))
        with torch.no_grad():
            outputs = self.reference.forward_stream(torch.from_numpy(frames).double()).float().numpy()
        path, free = "stream/test_sequence", (BATCH, SEQUENCE)
        write_test_data(self.folder / path, {"frame": frames}, {"output": outputs})
        return SequenceEntry(
            path,
            (TensorSpec("frame", "float32", (*free, self.config.embed_dim)),),
            (TensorSpec("output", "float32", (*free, self.config.output_size)),),
        )

    def sequence(self, batch: int, length: int) -> np.ndarray:
        return self.generator.standard_normal((batch, length, self.config.embed_dim)).astype(np.float32)

    def sets(self, wanted: int) -> int:
        """How many data sets there is room for."""
        size = sum(8 * math.prod(map(int, state.shape[1:])) for state in self.states)
        return max(1, min(wanted, _MAX_BYTES // (2 * size)))

    def rounded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (value.float() if value.is_floating_point() else value).detach().contiguous()
            for name, value in state.items()
        }

    def entry(
        self,
        graph: str,
        test_data: Sequence[str],
        max_sequence: int | None = None,
        test_sequence: SequenceEntry | None = None,
    ) -> GraphEntry:
        from ..programs.graphs import signature

        inputs, outputs = signature(graph, self.config.embed_dim, self.config.output_size, self.states)
        return GraphEntry(f"{graph}/model.onnx", inputs, outputs, tuple(test_data), max_sequence, test_sequence)
