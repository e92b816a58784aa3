"""The options of State Space Transformer, without torch.

state_size      width of the two projections whose product says how much of a frame is let in
num_heads       heads of the attention, each head_dim wide whatever hidden_size is
head_dim        width of one head
expand_factor   inner width of the recurrence, in units of hidden_size
conv_size       frames that the convolution before the recurrence sees
dropout         in training, between blocks
embed_dim       width of one frame; the projection to hidden_size is left out where they are equal
hidden_size     width of the residual stream and of the output
num_layers      blocks, one after the other
window_size     frames that a host feeds at once, of any number; those that attention sees in a stream
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .config import Config, Shapes, option, size_of

__all__ = ["SSTransformerConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSTransformerConfig(Config):
    """Options of the State Space Transformer, with the defaults of Edifice.SSM.SSTransformer.build/1."""

    stream_ends_with_window: ClassVar[bool] = True

    num_layers: int = option(6, minimum=1, maximum=512, help="number of blocks")
    dropout: float = option(0.1, minimum=0, below=1, help="dropout rate in training; inference has none")
    state_size: int = option(16, minimum=1, maximum=1024, help="width of what decides how much of a frame is let in")
    num_heads: int = option(4, minimum=1, maximum=1024, untold=True, help="attention heads")
    head_dim: int = option(64, minimum=1, maximum=16_384, help="width of one attention head")
    expand_factor: int = option(2, minimum=1, maximum=64, help="inner width of the recurrence, times hidden_size")
    conv_size: int = option(4, minimum=1, maximum=256, help="frames that the convolution sees")

    @property
    def inner_size(self) -> int:
        """Width of the recurrence, I."""
        return self.expand_factor * self.hidden_size

    @property
    def attention_size(self) -> int:
        """Width of the attention, H P."""
        return self.num_heads * self.head_dim

    @property
    def param_count(self) -> int:
        """Number of parameters, exactly (Edifice has no formula for SSTransformer)."""
        d, i, n, a = self.hidden_size, self.inner_size, self.state_size, self.attention_size
        norm = 2 * d
        ssm = (d + 1) * 2 * i + (self.conv_size + 1) * i + 2 * (i + 1) * n + (i + 1) * i + (i + 1) * d
        attention = 3 * (d + 1) * a + (a + 1) * d
        gate = (d + 1) * d
        ffn = (d + 1) * 4 * d + (4 * d + 1) * d
        projection = (self.embed_dim + 1) * d if self.embed_dim != d else 0
        return projection + self.num_layers * (2 * norm + ssm + attention + gate + ffn) + norm

    @classmethod
    def recommended_defaults(cls) -> dict[str, Any]:
        """Edifice.SSM.SSTransformer.recommended_defaults/0: the build defaults; no window is recommended."""
        return {
            "hidden_size": 256,
            "state_size": 16,
            "num_layers": 6,
            "num_heads": 4,
            "head_dim": 64,
            "expand_factor": 2,
            "conv_size": 4,
            "dropout": 0.1,
        }

    @classmethod
    def told_by(cls, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
        """See Config.told_by."""
        told = super().told_by(shapes, given)
        d, inner = told["hidden_size"], size_of(shapes, "blocks.0.ssm.out_proj.weight", 1)
        attention, heads = size_of(shapes, "blocks.0.attention.q.weight", 0), given.get("num_heads")
        told["state_size"] = size_of(shapes, "blocks.0.ssm.b_proj.weight", 0)
        told["expand_factor"] = inner // d if d and inner else None
        told["conv_size"] = size_of(shapes, "blocks.0.ssm.conv.weight", 2)
        told["head_dim"] = attention // heads if attention and heads else None
        return told
