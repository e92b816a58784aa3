"""mamba_ssm.ops.triton.layer_norm: norms that add a residual first, and give it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .computing import refuse, widened

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See mamba_ssm.ops.triton.layer_norm.layer_norm_fn: the norm of x + x1 + residual.

    Args:
        x: [..., width]; so for residual and x1.
        weight: [width].
        bias: [width].
        residual: added to x.
        x1: added to it, too.
        weight1: of a second norm of the same sum [width].
        bias1: of that one [width].
        eps: added to the variance.
        dropout_p: of x and x1, each for itself.
        rowscale: what x is multiplied by, [...].
        prenorm: whether to give the sum as well.
        residual_in_fp32: whether that is float32 where there was no residual, whose type it has otherwise.
        is_rms_norm: whether the mean is left in, and the root mean square divided by.
        return_dropout_mask: not covered.

    Returns:
        What is normed, like x; of a second norm, too; and the sum, if prenorm.

    Raises:
        RequestError: return_dropout_mask.
    """
    refuse("layer_norm_fn", return_dropout_mask=return_dropout_mask)
    total, other, before, scale = widened(x, x1, residual, rowscale)
    total = total if scale is None else total * scale.unsqueeze(-1)
    total = functional.dropout(total, dropout_p)
    total = total if other is None else total + functional.dropout(other, dropout_p)
    total = total if before is None else total + before
    several = [(weight, bias)] if weight1 is None else [(weight, bias), (weight1, bias1)]
    outputs = [_normed(total, *each, eps, is_rms_norm).to(x.dtype) for each in several]
    if prenorm:
        kept = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
        outputs.append(total.to(kept if residual is None else residual.dtype))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn with is_rms_norm."""
    first = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32)
    return layer_norm_fn(*first, True, return_dropout_mask)


class RMSNorm(nn.Module):
    """See mamba_ssm.ops.triton.layer_norm.RMSNorm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """See rms_norm_fn."""
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=dropout,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    x, weight, bias = widened(x, weight, bias)
    if not is_rms_norm:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias
