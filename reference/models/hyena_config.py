"""The options of Hyena, without torch.

order         how many long convolutions and gates follow each other
filter_size   width of the network that makes a kernel
window_size   frames that the kernels are made for; changes the output
dropout       in training, on both branches before they join the residual stream
embed_dim     width of one frame; the projection to hidden_size is left out where they are equal
hidden_size   width of the residual stream and of the output
num_layers    blocks, one after the other
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .config import MAX_WINDOW, Config, Shapes, option, size_of

__all__ = ["CONV_SIZE", "HyenaConfig"]

CONV_SIZE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyenaConfig(Config):
    """Options of Hyena, with the defaults of Edifice.SSM.Hyena.build/1."""

    window_binds: ClassVar[bool] = True

    dropout: float = option(0.1, minimum=0, below=1, help="dropout rate in training; inference has none")
    window_size: int = option(
        60,
        minimum=1,
        maximum=MAX_WINDOW,
        untold=True,
        help="frames that the filters are made for, and the most there can be",
    )
    order: int = option(2, minimum=1, maximum=64, help="long convolutions and gates in a block")
    filter_size: int = option(64, minimum=1, maximum=4096, help="width of the network that makes a filter")

    @property
    def param_count(self) -> int:
        """Edifice.SSM.Hyena.param_count/1: approximate, the matrices and little else."""
        d, f = self.hidden_size, self.filter_size
        projection = self.embed_dim * d if self.embed_dim != d else 0
        filters = self.order * (f + f * f + f * d)
        return projection + self.num_layers * ((self.order + 2) * d * d + CONV_SIZE * d + filters + 3 * d * 4 * d)

    @classmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """Edifice.SSM.Hyena.recommended_defaults/0: the build defaults."""
        return {
            "hidden_size": 256,
            "order": 2,
            "filter_size": 64,
            "num_layers": 4,
            "window_size": 60,
            "dropout": 0.1,
        }

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
        """See Config.told_by."""
        told = super().told_by(shapes, given)
        d, projected = told["hidden_size"], size_of(shapes, "blocks.0.proj.weight", 0)
        told["order"] = projected // d - 1 if d and projected else None
        told["filter_size"] = size_of(shapes, "blocks.0.filters.0.dense1.weight", 0)
        return told
