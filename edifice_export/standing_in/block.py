"""mamba_ssm.modules.block and mlp: what stands around a mixer, and what decoding carries from token to token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "GatedMLP", "InferenceParams", "Mixer", "State", "add_norm"]

State = Mapping[str, Tensor]
"""What a mixer carries from frame to frame, by kind."""


@dataclasses.dataclass
class InferenceParams:
    """See mamba_ssm.utils.generation.InferenceParams: the states of each layer, changed in place as tokens come."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts anew, with the same states."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Mixer(Protocol):
    """What a block mixes frames with."""

    def __call__(self, hidden_states: Tensor, *, inference_params: InferenceParams | None, **kwargs: Any) -> Tensor:
        """[batch, sequence, width] to the same."""

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first frame."""

    def advance(self, hidden_states: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Frames [batch, sequence, width], or one [batch, width], from a state; and the state after them."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token as the originals hold them."""


class GatedMLP(nn.Module):
    """See mamba_ssm.modules.mlp.GatedMLP: the second half of the first projection gates the first half."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wanted = hidden_features if hidden_features is not None else int(8 * in_features / 3)
        hidden = -(-wanted // multiple_of) * multiple_of
        width = out_features if out_features is not None else in_features
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


class Block(nn.Module):
    """See mamba_ssm.modules.block.Block: the residual is added, normed and mixed; and given on before that.

    Args:
        dim: width of frames.
        mixer_cls: makes the mixer from the width.
        mlp_cls: makes what follows it; nn.Identity for nothing.
        norm_cls: makes a norm.
        fused_add_norm: whether the residual keeps its type; otherwise what is normed is first put in the norm's.
        residual_in_fp32: whether the residual is float32.
    """

    layer_idx: int | None

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        if mlp_cls is nn.Identity:
            self.mlp = None
        else:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """What is mixed, and the residual that it is to be added to [batch, sequence, width]."""
        normed, residual = add_norm(self.norm, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)
        return self._after(self.mixer(normed, inference_params=inference_params, **mixer_kwargs), residual)

    def advance(
        self, hidden_states: Tensor, residual: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same of frames from a state, and the state after them: see Mixer."""
        normed, residual = add_norm(self.norm, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)
        mixed, after = self.mixer.advance(normed, state)
        return *self._after(mixed, residual), after

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The mixer's."""
        mixer: Mixer = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _after(self, mixed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is None:
            return mixed, residual
        normed, residual = add_norm(self.norm2, mixed, residual, self.fused_add_norm, self.residual_in_fp32)
        return self.mlp(normed), residual


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, fused: bool, in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum."""
    assert isinstance(norm, (nn.LayerNorm, RMSNorm)), "norms are those that create_block makes"
    if fused:
        normed, total = layer_norm_fn(
            hidden,
            norm.weight,
            norm.bias if isinstance(norm, nn.LayerNorm) else None,
            residual=residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return normed, total
    total = hidden if residual is None else hidden + residual
    normed = norm(total.to(norm.weight.dtype))
    return normed, total.to(torch.promote_types(total.dtype, torch.float32)) if in_fp32 else total
