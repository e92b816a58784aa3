"""A bundle's graphs, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnxruntime as ort

from ..bundle.bundle import Bundle, open_bundle
from ..errors import RequestError
from .arrays import check_array, check_finite
from .providers import ORT_ERRORS, failed, open_session, placement, why_not_usable
from .stream import HISTORY, Stream

__all__ = ["Model", "load"]


class Model:
    """A bundle's graphs on an execution provider. Calls from several threads at once are safe.

    It can't be copied or pickled (RequestError): load the bundle in each process.

    Attributes:
        bundle: where they come from.
        input: what a call takes, state_sequence float32 [batch, sequence, embed_dim].
        output: what it gives, output float32 [batch, hidden_size].
        session: of the window graph, or of the stream graph in a bundle without one.
        max_sequence: the most frames that a call takes at once, or None where any number will do.
        placement: nodes of that graph run by each provider, by short name.
        passed_over: providers that were preferred and are not usable, and why.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[str], threads: int | None, optimization: str) -> None:
        graphs = bundle.manifest.graphs
        self.bundle = bundle
        self._settings = list(providers), threads, optimization
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._opening = threading.Lock()
        self.has_window, self.has_stream = "window" in graphs, "stream" in graphs
        graph = graphs["window" if self.has_window else "prefill"]
        self.input, self.output, self.max_sequence = graph.inputs[0], graph.outputs[0], graph.max_sequence
        self.session = self.session_of("window" if self.has_window else "stream")
        self.placement = placement(self.session)
        self.passed_over = {short: reason for short in providers if (reason := why_not_usable(short)) is not None}

    def __reduce__(self) -> NoReturn:
        raise RequestError(
            f"a Model can't be copied or pickled: its sessions live in this process; load {self.bundle.path} in each "
            "process instead, and share one Model between threads"
        )

    @property
    def providers(self) -> list[str]:
        """Short names of the providers that really run nodes of the graph, the busiest first."""
        return sorted(self.placement, key=lambda short: -self.placement[short])

    @property
    def window_size(self) -> int:
        """Frames that the model was made for at once."""
        return self.bundle.manifest.window_size

    def __call__(self, state_sequence: np.ndarray) -> np.ndarray:
        """Runs one window.

        Args:
            state_sequence: float32 [batch, sequence, embed_dim], or [sequence, embed_dim] for a single one.

        Returns:
            float32 [batch, hidden_size], or [hidden_size].

        Raises:
            RequestError: another rank, width or dtype, no frame at all, more than max_sequence, a NaN or a number
                beyond MAX_MAGNITUDE, or a bundle that was built without the window graph.
            CheckError: ONNX Runtime could not run it, or the output is not finite.
        """
        if not self.has_window:
            raise RequestError(
                f"bundle {self.bundle.path}: has no window graph; use its stream, or build it with --graph both"
            )
        check_array(state_sequence, self.input)
        if self.max_sequence is not None and state_sequence.shape[-2] > self.max_sequence:
            raise RequestError(
                f"{self.input.name}: got {state_sequence.shape[-2]} frames, and {self.bundle.manifest.architecture} "
                f"can't compute more than the window of {self.max_sequence} that it was made for; give the last "
                f"{self.max_sequence}, or train and build it with a larger window_size"
            )
        batched = state_sequence.ndim == 3
        feed = np.ascontiguousarray(state_sequence if batched else state_sequence[None])
        try:
            (output,) = self.session.run([self.output.name], {self.input.name: feed})
        except ORT_ERRORS as error:
            given = f"{self.input.name} {list(feed.shape)} with {', '.join(self.providers)}"
            raise failed(given, error) from error
        check_finite(output, self.output.name)
        result: np.ndarray = output if batched else output[0]
        return result

    def stream(self, batch: int = 1, history: int = HISTORY) -> Stream:
        """Opens streams that share this model's sessions, at their start.

        Args:
            batch: how many, side by side.
            history: frames that they can be rewound by; each keeps a copy of the state in memory.

        Raises:
            RequestError: a bundle that was built without a stream, or a number out of range.
            CheckError: a file of the stream was changed or is missing, or its graphs are not those of the manifest.
        """
        if not self.has_stream:
            raise RequestError(
                f"bundle {self.bundle.path}: has no stream graph; build it with --graph both or --graph stream"
            )
        return Stream(self.bundle, self.session_of("stream"), self.session_of("prefill"), batch, history)

    def session_of(self, name: str) -> ort.InferenceSession:
        """The session of a graph (see manifest.GRAPHS), opened when it is first asked for."""
        with self._opening:
            if name not in self._sessions:
                model = self.bundle.manifest.graphs[name].model
                self.bundle.check(model)
                self._sessions[name] = open_session(self.bundle.file(model), *self._settings)
            return self._sessions[name]


def load(
    bundle: str | Path | Bundle,
    providers: Sequence[str] | str = ("cpu",),
    threads: int | None = None,
    optimization: str = "all",
) -> Model:
    """Opens a bundle for running.

    Args:
        bundle: its folder.
        providers: short names (cpu, cuda, tensorrt, dml, openvino, web, coreml, ...) in order of preference. Naming one
            means that one or an error; what was really used is `Model.providers`.
        threads: threads within an operator; ONNX Runtime's choice if None.
        optimization: ONNX Runtime's graph optimisation: all, extended, basic or none.

    Raises:
        RequestError: not a bundle, another schema, an ONNX Runtime that is too old, or no provider of the list is
            usable.
        CheckError: the bundle is damaged: a path leaves the folder, or a file was changed or is missing. Each is
            checked when it is used: the window graph, if the bundle has one, now; those of a stream when one is opened.
            Weights and test data need not be there.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, whole=False)
    return Model(opened, [providers] if isinstance(providers, str) else list(providers), threads, optimization)
