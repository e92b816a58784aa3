"""What every architecture here has around its blocks. Shapes: B batch, T sequence, E embed_dim, D hidden_size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import Config, Numerics, OptionError, check_numerics
from .contract import ReferenceModel
from .layers import LayerNorm
from .state import POSITION, State, kind_of, of_layer

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """input_projection -> blocks -> final_norm, over a window at once, or frame by frame with a state.

    A block takes [B, T, D] or [B, D] and what it carries from before (a part of a state, by kind), and gives the same
    shape and what it carries on. In a window it starts from `before_window`, which may lack what would be zero.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's, its numerical quirks included.
        make_block: makes one block.
        dropout: rate between blocks in training, for architectures that have no dropout inside them.
    """

    def __init__(
        self, config: Config, numerics: Numerics, make_block: Callable[[], nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_numerics(numerics)
        d = config.hidden_size
        self.config, self.numerics = config, numerics
        self.input_projection = nn.Identity() if config.embed_dim == d else nn.Linear(config.embed_dim, d)
        self.blocks = nn.ModuleList(make_block() for _ in range(config.num_layers))
        self.dropout = nn.Dropout(dropout)
        self.final_norm = LayerNorm(d, numerics)

    def forward(self, state_sequence: Tensor) -> Tensor:
        """The output at the last frame: [B, T, E] -> [B, D]."""
        return self.final_norm(self.hidden(state_sequence)[:, -1])

    def forward_prefixes(self, state_sequence: Tensor) -> Tensor:
        """The output at every frame, each that of the window which ends there: [B, T, E] -> [B, T, D]."""
        return self.final_norm(self.hidden(state_sequence))

    def forward_stream(self, sequence: Tensor) -> Tensor:
        """The output at every frame of a stream of any length from its start: [B, T, E] -> [B, T, D].

        Recurrences go on for ever; attention and long convolutions see the last `window_size` frames. Up to there it
        is forward_prefixes.
        """
        return self.extend(sequence, self.initial_state(sequence.shape[0]))[0]

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first frame, for a number of streams side by side.

        Raises:
            OptionError: this model has no stream, see why_no_stream.
        """
        if self.why_no_stream is not None:
            raise OptionError(self.why_no_stream)
        # Entries don't share memory: any of them can be written to.
        return {name: value.contiguous() for name, value in self.start(batch).items()}

    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """One frame on.

        Args:
            frame: [B, E].
            state: from initial_state, step or extend; it is not changed.

        Returns:
            The output [B, D] and the state after the frame.
        """
        return self.extend(frame, state)

    def extend(self, frames: Tensor, state: State) -> tuple[Tensor, State]:
        """A piece of a stream at once: what as many steps give.

        Args:
            frames: [B, T, E], or one frame [B, E].
            state: from initial_state, step or extend; it is not changed.

        Returns:
            The output at every frame [B, T, D], or [B, D], and the state after the last one.
        """
        x, after = self.run_blocks(self.input_projection(frames), state | self.constants())
        if POSITION in state:
            after[POSITION] = state[POSITION] + (frames.shape[1] if frames.ndim == 3 else 1)
        return self.final_norm(x), {name: after[name] for name in state}

    @property
    def why_no_stream(self) -> str | None:
        """Why this model can't go frame by frame, or None where it can."""
        return None

    def with_exact_recurrence(self) -> Backbone | None:
        """A copy that differs in its recurrence alone, which is exact; None if this one's is exact already."""
        return None

    def constants(self) -> State:
        """What layers read beside their state and no frame changes, named as a state is."""
        return {}

    def hidden(self, state_sequence: Tensor) -> Tensor:
        """The residual stream of a window after the last block: [B, T, E] -> [B, T, D]."""
        past = self.before_window() | self.constants()
        return self.run_blocks(self.input_projection(state_sequence), past)[0]

    def before_window(self) -> State:
        """The state that a window starts from, for all of a batch: no rings, as a window sees all of its frames."""
        return {}

    def run_blocks(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """All blocks, with dropout between them in training: [B, T, D] or [B, D] -> the same, and the state after."""
        after: State = {}
        for index, block in enumerate(self.blocks):
            x, kept = block(x, of_layer(past, index))
            after.update({f"{index}.{kind}": value for kind, value in kept.items()})
            if index < len(self.blocks) - 1:
                x = self.dropout(x)
        return x, after

    def start(self, batch: int) -> State:
        """What every layer carries before the first frame."""
        state: State = {}
        for index, block in enumerate(self.blocks):
            own: State = block.initial_state(batch)  # type: ignore[operator]
            state.update({f"{index}.{kind}": value for kind, value in own.items()})
        if any(kind_of(name) == "key" for name in state):
            state[POSITION] = torch.zeros(batch, dtype=torch.int64, device=next(iter(state.values())).device)
        return state


def _keeps_the_contract(model: Backbone) -> ReferenceModel:
    """For the type checker, which refuses this where Backbone lacks something."""
    return model
