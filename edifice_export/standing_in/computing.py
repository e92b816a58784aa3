"""What stand-ins share: the type to compute in, the scan in groups, and how arguments are refused."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edifice_reference import ops

from ..errors import RequestError

__all__ = ["activated", "grouped_scan", "refuse", "widened"]


def widened(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors in the type to compute in: that of the widest, float32 at least. What is None stays so."""
    given = [value for value in (first, *others) if value is not None]
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in given), torch.float32)
    return tuple(value if value is None else value.to(dtype) for value in (first, *others))


def activated(x: Tensor, activation: str | None) -> Tensor:
    """x, or its SiLU.

    Raises:
        RequestError: another activation.
    """
    if activation not in (None, "silu", "swish"):
        raise RequestError(f"activation must be None, silu or swish, got {activation!r:.80}")
    return x if activation is None else functional.silu(x)


def refuse(function: str, **arguments: object) -> None:
    """Refuses arguments that a stand-in has no mathematics for, where they are given.

    Raises:
        RequestError: names the first.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise RequestError(
                f"{function}: its stand-in takes no {name}; leave it out, or run where the real package has a GPU"
            )


def grouped_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ops.selective_scan where channels have their input weights and read-outs in groups.

    Args:
        x: scaled by its step [batch, sequence, channels], or one frame [batch, channels]; so for all that is streamed.
        delta: the step [batch, sequence, channels].
        a: rates [channels or 1, state].
        b: input weights [batch, sequence, groups, state]; each group is of as many channels, one after the other.
        c: read-outs, likewise.
        initial: the state before the first frame [batch or 1, state, channels].

    Returns:
        y [batch, sequence, channels] and the state after the last frame [batch, state, channels].
    """
    groups = b.shape[-2]
    width = x.shape[-1] // groups
    parts = []
    for index in range(groups):
        own = slice(index * width, (index + 1) * width)
        rates = a if a.shape[0] == 1 else a[own]
        before = None if initial is None else initial[..., own]
        given = x[..., own], delta[..., own], rates, b[..., index, :], c[..., index, :]
        parts.append(ops.selective_scan(*given, before))
    if groups == 1:
        return parts[0]
    return torch.cat([y for y, _ in parts], dim=-1), torch.cat([state for _, state in parts], dim=-1)
