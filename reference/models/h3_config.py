"""The options of H3, without torch.

state_size   how many decays each state-space model has, each with a memory of every channel
conv_size    frames that the short convolution sees
dropout      in training, on both branches before they join the residual stream
embed_dim    width of one frame; the projection to hidden_size is left out where they are equal
hidden_size  width of the residual stream and of the output
num_layers   blocks, one after the other
window_size  frames that a host feeds at once; any number can be computed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import Config, Shapes, option, size_of

__all__ = ["H3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class H3Config(Config):
    """Options of H3, with the defaults of Edifice.SSM.H3.build/1."""

    dropout: float = option(0.1, minimum=0, below=1, help="dropout rate in training; inference has none")
    state_size: int = option(64, minimum=1, maximum=1024, help="states of each of the two state-space models")
    conv_size: int = option(4, minimum=1, maximum=256, help="frames that the short convolution sees")

    @property
    def param_count(self) -> int:
        """Edifice.SSM.H3.param_count/1: approximate, the matrices and little else."""
        d, n = self.hidden_size, self.state_size
        projection = self.embed_dim * d if self.embed_dim != d else 0
        return projection + self.num_layers * (4 * d * n + 2 * d * d + 2 * d * 4 * d)

    @classmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """Edifice.SSM.H3.recommended_defaults/0: the build defaults."""
        return {
            "hidden_size": 256,
            "state_size": 64,
            "conv_size": 4,
            "num_layers": 4,
            "window_size": 60,
            "dropout": 0.1,
        }

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
        """See Config.told_by."""
        return {
            **super().told_by(shapes, given),
            "state_size": size_of(shapes, "blocks.0.shift.b.weight", 0),
            "conv_size": size_of(shapes, "blocks.0.conv.weight", 2),
        }
