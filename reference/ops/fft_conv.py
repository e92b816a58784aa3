"""Hyena's long convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .op import declare

__all__ = ["fft_conv"]


def _case(draw: Callable[..., Tensor], n: Mapping[str, int]) -> dict[str, Any]:
    x = draw(n["batch"], n["sequence"], n["channels"])
    return {"x": x, "kernel": draw(max(n["sequence"], 70), n["channels"])}


@declare(streamed=("x",), cases=(_case,))
def fft_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution with a kernel as long as the window, through the frequency domain (Hyena, arXiv 2302.10866).

        y_t[c] = sum_{s <= t} kernel[t - s, c] * x_s[c]

    Args:
        x: [batch, sequence, channels]; sequence at most window.
        kernel: one tap for each frame of the past, the current frame's first [window, channels].

    Returns:
        [batch, sequence, channels].

    Raises:
        ValueError: the sequence is longer than the kernel.
    """
    length, window = x.shape[1], kernel.shape[0]
    if length > window:
        raise ValueError(f"a sequence of {length} frames is longer than the kernel, which ends at {window}")
    size = 2 * length
    spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(kernel[:length], size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :length].contiguous()
