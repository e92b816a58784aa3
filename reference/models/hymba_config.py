"""The options of Hymba, without torch.

state_size         states of the selective scan for each channel, with rates -1 to -N
num_heads          attention heads, which share hidden_size
num_meta_tokens    learned positions that every query sees
meta_propagation   whether these are positions of the sequence, as in the paper, and pass through every block
dropout            in training, between blocks
embed_dim          width of one frame; the projection to hidden_size is left out where they are equal
hidden_size        width of the residual stream and of the output
num_layers         blocks, one after the other
window_size        frames that a host feeds at once, of any number; those that attention sees in a stream
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .config import Config, OptionError, Shapes, option, size_of

__all__ = ["CONV_SIZE", "EXPAND", "HymbaConfig"]

EXPAND = 2
CONV_SIZE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class HymbaConfig(Config):
    """Options of Hymba, with the defaults of Edifice.SSM.Hymba.build/1."""

    stream_ends_with_window: ClassVar[bool] = True

    state_size: int = option(16, minimum=1, maximum=1024, help="state of the selective scan, per channel")
    num_heads: int = option(4, minimum=1, maximum=1024, untold=True, help="attention heads; must divide hidden_size")
    num_meta_tokens: int = option(4, minimum=0, maximum=4096, help="learned positions before the first frame")
    meta_propagation: bool = option(
        False,
        help="meta tokens pass through every block as positions (the paper), instead of per-layer keys and values",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise OptionError(
                f"hidden_size must be a multiple of num_heads, got hidden_size {self.hidden_size} and "
                f"num_heads {self.num_heads}"
            )

    @property
    def inner_size(self) -> int:
        """Width of the Mamba path, I."""
        return EXPAND * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """Rank of the projection that makes the step, R."""
        return max(self.inner_size // 16, 1)

    @property
    def param_count(self) -> int:
        """Number of parameters, exactly (Edifice has no formula for Hymba)."""
        d, i, n, r = self.hidden_size, self.inner_size, self.state_size, self.dt_rank
        norm = 2 * d
        mamba = (d + 1) * 2 * i + (CONV_SIZE + 1) * i + (i + 1) * 2 * n + (i + 1) * r + (r + 1) * i + (i + 1) * d
        attention = 4 * (d + 1) * d
        gate = (d + 1) * d
        ffn = (d + 1) * 4 * d + (4 * d + 1) * d
        meta = self.num_meta_tokens * d if self.meta_propagation else 2 * self.num_layers * self.num_meta_tokens * d
        projection = (self.embed_dim + 1) * d if self.embed_dim != d else 0
        return projection + self.num_layers * (2 * norm + mamba + attention + gate + ffn) + meta + norm

    @classmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """Edifice.SSM.Hymba.recommended_defaults/0: the build defaults but for dropout."""
        return {
            "hidden_size": 256,
            "state_size": 16,
            "num_layers": 4,
            "num_heads": 4,
            "num_meta_tokens": 4,
            "window_size": 60,
            "dropout": 0.1,
        }

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
        """See Config.told_by."""
        both = size_of(shapes, "blocks.0.mamba.bc_proj.weight", 0)
        own, propagated = (size_of(shapes, name, 0) for name in ("blocks.0.attention.meta_k", "meta_tokens"))
        return {
            **super().told_by(shapes, given),
            "state_size": both // 2 if both else None,
            "num_meta_tokens": own or propagated or 0,
            "meta_propagation": propagated is not None,
        }
