"""What every architecture here has around its blocks. Shapes: B batch, T sequence, E embed_dim, D hidden_size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .config import Config, Numerics, check_numerics
from .layers import LayerNorm

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """input_projection -> blocks -> final_norm -> last timestep.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's, its numerical quirks included.
        make_block: makes one block, [B, T, D] -> [B, T, D].
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

    def with_exact_recurrence(self) -> Backbone | None:
        """A copy that differs in its recurrence alone, which is exact; None if this one's is exact already."""
        return None

    def hidden(self, state_sequence: Tensor) -> Tensor:
        """The residual stream after the last block: [B, T, E] -> [B, T, D]."""
        return self.run_blocks(self.input_projection(state_sequence))

    def run_blocks(self, x: Tensor) -> Tensor:
        """All blocks, with dropout between them in training: [B, T, D] -> [B, T, D]."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index < len(self.blocks) - 1:
                x = self.dropout(x)
        return x
