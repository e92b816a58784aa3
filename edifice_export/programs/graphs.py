"""The graphs of a bundle: what each takes and gives, and the module that computes it, with states as tensors."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from edifice_reference.models.contract import ReferenceModel

from ..specification import BATCH, PAST, SEQUENCE, InputSpec, OutputSpec, Size, StateSpec
from ..values import Arrays
from .freeze import freeze

__all__ = ["State", "carry_states", "entry", "signature", "state_specs", "values_in_files"]


def signature(
    graph: str, embed_dim: int, hidden_size: int, states: tuple[StateSpec, ...]
) -> tuple[tuple[InputSpec, ...], tuple[OutputSpec, ...]]:
    """What a graph of manifest.GRAPHS takes and what it gives."""
    output = OutputSpec("output", "float32", (BATCH, hidden_size), "last")
    sequence = InputSpec("state_sequence", "float32", (BATCH, SEQUENCE, embed_dim))
    if graph == "window":
        return (sequence,), (output,)
    first = InputSpec("frame", "float32", (BATCH, embed_dim)) if graph == "stream" else sequence
    return (first, *(state.past for state in states)), (output, *(state.present() for state in states))


INITIAL = "stream/initial"
"""The folder of what states start from where no single number stands for it."""

State = dict[str, Tensor]


def state_specs(initial_state: State, batch: Size = BATCH) -> tuple[StateSpec, ...]:
    """The states of a stream, from those of one entry; an axis of size 0 is one that grows."""
    specs = []
    for index, (name, value) in enumerate(initial_state.items()):
        first = value.flatten()[0].item() if value.numel() else value.new_zeros(()).item()
        # By number: a name may be no name of a file.
        initial = first if bool((value == first).all()) else f"{INITIAL}/{index}.pb"
        sizes = (size or PAST for size in value.shape[1:])
        specs.append(StateSpec(name, str(value.dtype).removeprefix("torch."), (batch, *sizes), initial))
    return tuple(specs)


def values_in_files(states: Sequence[StateSpec], initial_state: State) -> Arrays:
    """Of states that no single number fills, what one entry starts from."""
    return {state.name: initial_state[state.name].numpy() for state in states if isinstance(state.initial, str)}


Stepping = Callable[[Any, Sequence[Tensor], State], tuple[Sequence[Tensor], State]]
"""From a module, frames and a state to outputs and the state after them."""


def carry_states(module: nn.Module, run: Stepping, names: Sequence[str], last: bool) -> nn.Module:
    """Has a module's forward take frames and then states, as tensors, and give outputs and states.

    Args:
        module: is changed. Not one around it: names in the graph are paths in the model.
        run: what it computes.
        names: of the states, in order.
        last: whether outputs are at every frame, of which the last is given.
    """

    def forward(self: Any, *given: Tensor) -> tuple[Tensor, ...]:
        frames = given[: len(given) - len(names)]
        outputs, present = run(self, frames, dict(zip(names, given[len(frames) :], strict=True)))
        return *((value[:, -1] for value in outputs) if last else outputs), *(present[name] for name in names)

    object.__setattr__(module, "forward", types.MethodType(forward, module))
    return module


def entry(model: ReferenceModel, graph: str) -> nn.Module:
    """A copy of a reference model whose forward computes one graph, with the values that no input changes in it.

    Of the stream and prefill graphs it takes and gives states as tensors, in the order of the initial state.
    """
    frozen = freeze(model)
    assert isinstance(frozen, nn.Module)
    if graph == "window":
        return frozen
    names = list(model.initial_state(1))

    def step(self: ReferenceModel, frames: Sequence[Tensor], state: State) -> tuple[Sequence[Tensor], State]:
        (given,) = frames
        output, present = self.step(given, state) if graph == "stream" else self.extend(given, state)
        return (output,), present

    return carry_states(frozen, step, names, last=graph == "prefill")
