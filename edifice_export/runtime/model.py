"""A bundle's window graph, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..bundle import Bundle, open_bundle
from ..errors import CheckError, RequestError
from ..specification import TensorSpec
from .providers import ORT_ERRORS, open_session, placement, why_not_usable

__all__ = ["Model", "load"]


class Model:
    """A window graph on an execution provider. Calls from several threads at once are safe.

    Attributes:
        bundle: where it comes from.
        input: what it takes, state_sequence float32 [batch, sequence, embed_dim].
        output: what it gives, output float32 [batch, hidden_size].
        max_sequence: the most frames that it takes at once, or None where any number will do.
        placement: nodes run by each provider, by short name.
        passed_over: providers that were preferred and are not usable, and why.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[str], threads: int | None, optimization: str) -> None:
        graph = bundle.manifest.graphs["window"]
        self.bundle = bundle
        (self.input,), (self.output,) = graph.inputs, graph.outputs
        self.session = open_session(bundle.file(graph.model), providers, threads, optimization)
        self.placement = placement(self.session)
        self.passed_over = {short: reason for short in providers if (reason := why_not_usable(short)) is not None}
        self.max_sequence = graph.max_sequence
        self._check_signature()

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
            RequestError: another rank, width or dtype, no frame at all, more than max_sequence, or a NaN or infinity.
            CheckError: ONNX Runtime could not run it.
        """
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
            raise CheckError(
                f"ONNX Runtime failed on {self.input.name} {list(feed.shape)} with {', '.join(self.providers)}: {error}"
            ) from error
        result: np.ndarray = output if batched else output[0]
        return result

    def _check_signature(self) -> None:
        """Refuses a graph that is not the one of the manifest."""
        for spec, found in ((self.input, self.session.get_inputs()), (self.output, self.session.get_outputs())):
            described = [TensorSpec(each.name, each.type, tuple(each.shape)) for each in found]
            if described != [TensorSpec(spec.name, "tensor(float)", spec.shape)]:
                raise CheckError(
                    f"bundle {self.bundle.path}: the manifest says {spec} and the graph has "
                    f"{', '.join(map(str, described))}; build the bundle again"
                )


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
        RequestError: not a bundle, a newer schema, or no provider of the list is usable.
        CheckError: the bundle is damaged: a file was changed or is missing, a path leaves the folder.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return Model(opened, [providers] if isinstance(providers, str) else list(providers), threads, optimization)


def check_array(array: np.ndarray, spec: TensorSpec) -> None:
    """Refuses an array that is not what the graph takes.

    Raises:
        RequestError: names the tensor, what was expected and what was found.
    """
    if not isinstance(array, np.ndarray):
        raise RequestError(f"{spec.name} should be a numpy array {spec}, got {type(array).__name__}")
    width = spec.shape[-1]
    expected = f"{spec} or [{', '.join(map(str, spec.shape[1:]))}]"
    if array.ndim not in (2, 3) or array.shape[-1] != width:
        raise RequestError(f"{spec.name}: expected {expected}, got shape {list(array.shape)}")
    if array.dtype != np.dtype(spec.dtype):
        raise RequestError(
            f"{spec.name}: expected {expected}, got {array.dtype}; convert it with .astype(np.{spec.dtype})"
        )
    if 0 in array.shape:
        raise RequestError(f"{spec.name}: expected {expected}, got shape {list(array.shape)}, which holds nothing")
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        raise RequestError(f"{spec.name}: holds {array[tuple(place)]} at {place.tolist()}; give finite numbers only")
