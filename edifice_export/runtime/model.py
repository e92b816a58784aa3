"""A bundle's graphs, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort

from ..arguments import mapping, text, words
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import ARCHITECTURE
from ..errors import RequestError
from .arrays import batch_symbol, check_array, check_finite, check_sizes
from .providers import ORT_ERRORS, failed, open_session, placement, why_not_usable
from .stream import HISTORY, Stream

__all__ = ["Model", "load"]


class Model:
    """A bundle's graphs on an execution provider. Calls from several threads at once are safe.

    It can't be copied or pickled (RequestError): load the bundle in each process.

    Attributes:
        bundle: where they come from.
        inputs: what a call takes, such as state_sequence float32 [batch, sequence, embed_dim]; without a window graph
            what a stream takes.
        outputs: what it gives, such as output float32 [batch, hidden_size].
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
        name = next(name for name in ("window", "prefill", "stream") if name in graphs)
        self.inputs, self.outputs = bundle.manifest.own_tensors(name)
        self.max_sequence = bundle.manifest.max_frames(name)
        self._limits = graphs[name].limits
        self._single = batch_symbol(self.inputs, self.outputs) is not None
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

    def __call__(self, *inputs: np.ndarray, **named: np.ndarray) -> Any:
        """Runs the window graph.

        Args:
            inputs: in their order, such as float32 [batch, sequence, embed_dim]; where all inputs and outputs are of a
                batch, a single entry without that axis will do.
            named: those that are given by name.

        Returns:
            The output, or a tuple of several; of a single entry without the axis of the batch.

        Raises:
            RequestError: see run; or an input that there is not, or given twice.
            CheckError: see run.
        """
        names = [spec.name for spec in self.inputs]
        given = dict(zip(names, inputs, strict=False))
        if len(inputs) > len(names) or given.keys() & named.keys():
            raise RequestError(f"{self._name} takes {', '.join(names)}, each once; got {len(inputs)} and {[*named]}")
        outputs = tuple(self.run(given | named).values())
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the window graph on inputs by name, and gives its outputs by name.

        Raises:
            RequestError: an input is missing or one too many, another rank, size or dtype, sizes that should be equal
                and differ, no frame at all, more than max_sequence, a NaN, a number beyond MAX_MAGNITUDE, an id that
                there is not, or a bundle that was built without the window graph.
            CheckError: ONNX Runtime could not run it, or an output is not finite.
        """
        if not self.has_window:
            raise RequestError(
                f"bundle {self.bundle.path}: has no window graph; use its stream, or build it with --graph both"
            )
        inputs = mapping("inputs", inputs, "arrays by name")
        if inputs.keys() != {spec.name for spec in self.inputs}:
            wanted = ", ".join(map(str, self.inputs))
            raise RequestError(f"{self._name} takes {wanted}; got {', '.join(inputs) or 'nothing'}")
        arrays = [inputs[spec.name] for spec in self.inputs]
        for array, spec in zip(arrays, self.inputs, strict=True):
            check_array(array, spec, self._single)
        ranks = {array.ndim - len(spec.shape) for array, spec in zip(arrays, self.inputs, strict=True)}
        if len(ranks) > 1:
            raise RequestError(f"{self._name}: some inputs have a batch and others not; give all the same")
        batched = ranks == {0}
        feeds = [np.asarray(array if batched else array[None], order="C") for array in arrays]
        self._check_frames(feeds)
        check_sizes(feeds, self.inputs, self._limits)
        names = [spec.name for spec in self.outputs]
        try:
            found = self.session.run(names, {spec.name: feed for spec, feed in zip(self.inputs, feeds, strict=True)})
        except ORT_ERRORS as error:
            shapes = ", ".join(f"{spec.name} {list(feed.shape)}" for spec, feed in zip(self.inputs, feeds, strict=True))
            raise failed(f"{shapes} with {', '.join(self.providers)}", error) from error
        for name, value in zip(names, found, strict=True):
            check_finite(value, name)
        return {name: value if batched else value[0] for name, value in zip(names, found, strict=True)}

    def _check_frames(self, feeds: Sequence[np.ndarray]) -> None:
        """Refuses more frames than an architecture was made for, and says what to do."""
        frames, program = self.bundle.manifest.frames, self.bundle.manifest.program
        if self.max_sequence is None or program.kind != ARCHITECTURE:
            return
        (spec,), (feed,) = self.inputs, feeds
        length = feed.shape[[str(size) for size in spec.shape].index(str(frames))]
        if length > self.max_sequence:
            raise RequestError(
                f"{spec.name}: got {length} frames, and {self._name} can't compute more than the window of "
                f"{self.max_sequence} that it was made for; give the last {self.max_sequence}, or train and build it "
                "with a larger window_size"
            )

    @property
    def _name(self) -> str:
        return self.bundle.manifest.program.name

    def stream(self, batch: int = 1, history: int = HISTORY) -> Stream:
        """Opens streams that share this model's sessions, at their start.

        Args:
            batch: how many, side by side.
            history: frames that they can be rewound by; each keeps a copy of the state in memory.

        Raises:
            RequestError: a bundle that was built without a stream, or a number out of range.
            CheckError: a file of the stream was changed or is missing, or its graphs are not those of the manifest.
        """
        self.check_stream()
        session = self.session_of("stream")
        prefill = self.session_of("prefill") if "prefill" in self.bundle.manifest.graphs else None
        return Stream(self.bundle, session, prefill, batch, history)

    def check_stream(self) -> None:
        """Refuses a bundle without a stream.

        Raises:
            RequestError: says what to do.
        """
        if self.has_stream:
            return
        if self.bundle.manifest.program.kind == ARCHITECTURE:
            remedy = "build it with --graph both or --graph stream"
        else:
            remedy = "its module has no step(*frame, state) and initial_state(batch); give it both and export it again"
        raise RequestError(f"bundle {self.bundle.path}: has no stream graph; {remedy}")

    def session_of(self, name: str) -> ort.InferenceSession:
        """The session of a graph (see manifest.GRAPHS), opened when it is first asked for."""
        text("name", name, self.bundle.manifest.graphs)
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
    return Model(opened, words("providers", providers), threads, optimization)
