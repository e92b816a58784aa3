"""mamba_ssm.ops.triton.layernorm_gated: norms in groups of channels, with a gate before or after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .computing import widened

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"]


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """See mamba_ssm.ops.triton.layernorm_gated.layernorm_fn.

    Args:
        x: [..., width]; so for z.
        weight: [width].
        bias: [width].
        z: gates by its SiLU.
        eps: added to the variance.
        group_size: channels that are normed together; all if None.
        norm_before_gate: whether what is normed is gated, or what is gated is normed.
        is_rms_norm: whether the mean is left in, and the root mean square divided by.

    Returns:
        Like x.
    """
    given, scale, shift, gate = widened(x, weight, bias, z)
    opened = None if gate is None else functional.silu(gate)
    if opened is not None and not norm_before_gate:
        given = given * opened
    grouped = given.unflatten(-1, (-1, group_size or given.shape[-1]))
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * scale
    y = y if shift is None else y + shift
    return (y if opened is None or not norm_before_gate else y * opened).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """layernorm_fn with is_rms_norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """See mamba_ssm.ops.triton.layernorm_gated.LayerNorm."""

    is_rms_norm = False
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        shift = None if self.is_rms_norm else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", shift)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """See layernorm_fn."""
        how = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, z, *how)


class RMSNorm(LayerNorm):
    """See mamba_ssm.ops.triton.layernorm_gated.RMSNorm."""

    is_rms_norm = True
