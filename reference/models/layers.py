"""Layers that several architectures share. Shapes: B batch, T sequence, C channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .config import Numerics
from .contract import ReferenceModel
from .state import State

__all__ = [
    "CausalAttention",
    "CausalConv1d",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "initialize",
    "prepend",
    "softplus",
]


LARGEST_EXPONENT = math.log(torch.finfo(torch.float32).max)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis; with edifice numerics a variance below epsilon counts as zero, as in Axon."""

    def __init__(self, channels: int, numerics: Numerics) -> None:
        super().__init__(channels, eps=1e-5)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if self.numerics == "standard":
            return super().forward(x)
        return ops.floored_layer_norm(x, self.weight, self.bias, self.eps)


class CausalConv1d(nn.Module):
    """Depthwise convolution over time that sees the current frame and the kernel_size - 1 frames before it."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def initial_state(self, batch: int) -> State:
        """`conv`: the frames before the first, zero; nothing if the kernel sees only the current frame."""
        channels, _, kernel_size = self.weight.shape
        return {"conv": self.weight.new_zeros(batch, kernel_size - 1, channels)} if kernel_size > 1 else {}

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, C] or [B, C], of the same shape -> and the state after it."""
        y, conv = ops.causal_conv1d(x, self.weight, self.bias, self.weight.shape[0], past.get("conv"))
        return y, {"conv": conv} if conv.shape[1] > 0 else {}


class FeedForward(nn.Module):
    """down(gelu(up(x))), four times as wide inside, with the exact (erf) gelu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down(functional.gelu(self.up(x)))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 4 * channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class CausalAttention(nn.Module):
    """Multi-head attention of a width of its own; learned meta keys and values, if any, come before the first frame.

    In a window every frame sees all before it. In a stream it sees the last `window_size` frames, itself among them.
    """

    def __init__(
        self, channels: int, width: int, num_heads: int, window_size: int, numerics: Numerics, num_meta: int = 0
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.epsilon = 1e-8 if numerics == "edifice" else 0.0
        self.q, self.k, self.v = (nn.Linear(channels, width) for _ in range(3))
        self.out_proj = nn.Linear(width, channels)
        self.has_meta = num_meta > 0
        if self.has_meta:
            self.meta_k = nn.Parameter(torch.empty(num_meta, width))
            self.meta_v = nn.Parameter(torch.empty(num_meta, width))

    def initial_state(self, batch: int) -> State:
        """`key` and `value`: rings of the last frames' keys and values."""
        width = self.q.weight.shape[0]
        shape = (batch, self.num_heads, self.window_size, width // self.num_heads)
        return {"key": self.q.weight.new_zeros(shape), "value": self.q.weight.new_zeros(shape)}

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, C], or with a state also [B, C], of the same shape -> and the state after it.

        Without a state what comes after it are the keys and the values of x. `sink_key` and `sink_value` of a past are
        positions [M, W] that every frame sees, in place of meta keys and values of this layer's own.
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.has_meta:
            past = {**past, "sink_key": self.meta_k, "sink_value": self.meta_v}
        sinks = [past[name] for name in ("sink_key", "sink_value") if name in past]
        if "key" in past:
            ring = past["key"], past["value"], past["position"]
            y, key, value = ops.sliding_attention(q, k, v, self.num_heads, self.epsilon, *ring, *sinks)
            return self.out_proj(y), {"key": key, "value": value}
        key, value = (prepend(sink, new) for sink, new in zip(sinks, (k, v), strict=True)) if sinks else (k, v)
        y = ops.causal_attention(q, key, value, self.num_heads, self.epsilon)
        return self.out_proj(y), {"key": k, "value": v}


def prepend(tokens: Tensor, sequence: Tensor) -> Tensor:
    """Puts the same learned positions before each entry's own: [M, C], [B, T, C] -> [B, M + T, C]."""
    return torch.cat([tokens.expand(sequence.shape[0], -1, -1), sequence], dim=1)


def softplus(x: Tensor, numerics: Numerics) -> Tensor:
    """log(1 + exp(x)); with edifice numerics by this very formula, which overflows in float32 above 88.7.

    In float64 too it is infinite from there on: what it stands for is Edifice, which computes in float32.
    """
    if numerics == "standard":
        return functional.softplus(x)
    naive = torch.log(torch.exp(x) + 1)
    return naive if x.dtype == torch.float32 else torch.where(x > LARGEST_EXPONENT, torch.inf, naive)


@torch.no_grad()
def initialize(model: ReferenceModel, seed: int) -> None:
    """Gives every parameter Edifice's initial value: biases zero, all else Glorot uniform, layer-norm weights included.

    Fans follow Axon: a vector counts its length on both sides, a convolution its kernel times its channels. Values that
    are an architecture's own come from its modules' `initial_values`.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if hasattr(module, "initial_values")
        for name, value in module.initial_values().items()  # type: ignore[operator]
    }
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.copy_(own[name])
            continue
        if name.endswith("bias"):
            parameter.zero_()
            continue
        match parameter.shape:
            case (length,):
                fan_in = fan_out = length
                bound = math.sqrt(3)  # Axon: U(-sqrt 3, sqrt 3) for a vector, whatever its length
            case (channels, 1, kernel):
                fan_in, fan_out = kernel, kernel * channels
                bound = math.sqrt(6 / (fan_in + fan_out))
            case (fan_out, fan_in):
                bound = math.sqrt(6 / (fan_in + fan_out))
            case shape:
                raise ValueError(f"no initial value is defined for {name} of shape {list(shape)}")
        values = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_((2 * values - 1) * bound)
