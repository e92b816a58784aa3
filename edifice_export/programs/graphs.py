"""The graphs of a bundle: what each takes and gives, and the module that computes it."""

from __future__ import annotations

import types

from torch import Tensor, nn

from edifice_reference.models.contract import ReferenceModel

from ..specification import BATCH, SEQUENCE, InputSpec, OutputSpec, StateSpec
from .freeze import freeze

__all__ = ["entry", "signature", "state_specs"]


def signature(
    graph: str, embed_dim: int, hidden_size: int, states: tuple[StateSpec, ...]
) -> tuple[tuple[InputSpec, ...], tuple[OutputSpec, ...]]:
    """What a graph of manifest.GRAPHS takes and what it gives."""
    output = OutputSpec("output", "float32", (BATCH, hidden_size), "last")
    sequence = InputSpec("state_sequence", "float32", (BATCH, SEQUENCE, embed_dim))
    if graph == "window":
        return (sequence,), (output,)
    first = InputSpec("frame", "float32", (BATCH, embed_dim)) if graph == "stream" else sequence
    return (first, *(state.past for state in states)), (output, *(state.present for state in states))


def state_specs(initial_state: dict[str, Tensor], folder: str) -> tuple[StateSpec, ...]:
    """The states of a stream, from those of one entry; `folder` is for values that no single number stands for."""
    specs = []
    for name, value in initial_state.items():
        first = value.flatten()[0].item()
        initial = first if bool((value == first).all()) else f"{folder}/{name}.pb"
        specs.append(StateSpec(name, str(value.dtype).removeprefix("torch."), (BATCH, *value.shape[1:]), initial))
    return tuple(specs)


def entry(model: ReferenceModel, graph: str) -> nn.Module:
    """A copy of a reference model whose forward computes one graph, with the values that no input changes in it.

    Of the stream and prefill graphs it takes and gives states as tensors, in the order of the initial state.
    """
    frozen = freeze(model)
    assert isinstance(frozen, nn.Module)
    if graph == "window":
        return frozen
    names = list(model.initial_state(1))

    def step(self: ReferenceModel, frame: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        output, present = self.step(frame, dict(zip(names, past, strict=True)))
        return output, *present.values()

    def prefill(self: ReferenceModel, state_sequence: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        outputs, present = self.extend(state_sequence, dict(zip(names, past, strict=True)))
        return outputs[:, -1], *present.values()

    # Not a module around it: names in the graph are paths in the model.
    object.__setattr__(frozen, "forward", types.MethodType(step if graph == "stream" else prefill, frozen))
    return frozen
