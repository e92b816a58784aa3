"""Mixers of images as their authors have them, on what they import: their names of parameters, their formulas."""

from __future__ import annotations

import torch
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, selective_scan_fn
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee


class MambaVisionMixer(nn.Module):
    """MambaVision (arXiv 2407.08083): half of the channels are scanned, and nothing is gated."""

    def __init__(self, width: int = 24, state: int = 8, rank: int = 2) -> None:
        super().__init__()
        self.rank, self.state, half = rank, state, width // 2
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, groups=half, padding="same", bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, groups=half, padding="same", bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        x, z = functional.silu(self.conv1d_x(x)), functional.silu(self.conv1d_z(z))
        dt, b, c = self.x_proj(x.transpose(1, 2)).split([self.rank, self.state, self.state], dim=-1)
        dt = self.dt_proj(dt).transpose(1, 2)  # whose bias is added again below, as the authors do
        b, c = b.transpose(1, 2).contiguous(), c.transpose(1, 2).contiguous()
        bias = self.dt_proj.bias.float()
        y = selective_scan_fn(
            x, dt, -torch.exp(self.A_log.float()), b, c, self.D.float(), z=None, delta_bias=bias, delta_softplus=True
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))


class VimMixer(nn.Module):
    """Vision Mamba's block, bimamba_type v2 with if_divide_out (arXiv 2401.09417): both directions, then their mean."""

    def __init__(self, width: int = 16, state: int = 8, rank: int = 1) -> None:
        super().__init__()
        inner = 2 * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        for end in ("", "_b"):
            self.add_module(f"conv1d{end}", nn.Conv1d(inner, inner, 4, groups=inner, padding=3))
            self.add_module(f"x_proj{end}", nn.Linear(inner, rank + 2 * state, bias=False))
            self.add_module(f"dt_proj{end}", nn.Linear(rank, inner))
            rates = torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1)
            self.register_parameter("A_b_log" if end else "A_log", nn.Parameter(rates))
            self.register_parameter(f"D{end}", nn.Parameter(torch.ones(inner)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        xz = self.in_proj(hidden_states).transpose(1, 2)
        there = mamba_inner_fn_no_out_proj(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            -torch.exp(self.A_log.float()),
            None,
            None,
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        back = mamba_inner_fn_no_out_proj(
            xz.flip([-1]),
            self.conv1d_b.weight,
            self.conv1d_b.bias,
            self.x_proj_b.weight,
            self.dt_proj_b.weight,
            -torch.exp(self.A_b_log.float()),
            None,
            None,
            self.D_b.float(),
            delta_bias=self.dt_proj_b.bias.float(),
            delta_softplus=True,
        )
        both = (there + back.flip([-1])).transpose(1, 2) / 2
        return functional.linear(both, self.out_proj.weight, self.out_proj.bias)


class SS2D(nn.Module):
    """VMamba's SS2D, forward_type v0 (arXiv 2401.10166): an image [batch, height, width, channels] in four orders."""

    def __init__(self, width: int = 16, state: int = 8, rank: int = 1) -> None:
        super().__init__()
        self.rank, self.state, inner = rank, state, 2 * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, groups=inner, padding=1)
        self.x_proj_weight = nn.Parameter(torch.randn(4, rank + 2 * state, inner) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.randn(4, inner) - 3)
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = functional.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        return self.out_proj(self.out_norm(self.scan(x)) * functional.silu(z))

    def scan(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        there = torch.stack([rows, columns], dim=1)
        xs = torch.cat([there, there.flip([-1])], dim=1)  # [batch, 4, channels, height * width]
        read = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        dts, bs, cs = read.split([self.rank, self.state, self.state], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, self.dt_projs_weight)
        ys = selective_scan_fn(
            xs.flatten(1, 2),
            dts.flatten(1, 2),
            -torch.exp(self.A_logs.float()),
            bs.contiguous(),
            cs.contiguous(),
            self.Ds.float(),
            z=None,
            delta_bias=self.dt_projs_bias.float().view(-1),
            delta_softplus=True,
        )
        ys = ys.unflatten(1, (4, -1))
        both = ys[:, :2] + ys[:, 2:].flip([-1])
        across = both[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
        return (both[:, 0] + across).transpose(1, 2).reshape(batch, height, width, -1)


class OfPixels(nn.Module):
    """A mixer of sequences over the pixels of an image [batch, channels, height, width], row by row."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        mixed = self.mixer(image.flatten(2).transpose(1, 2))
        return mixed.transpose(1, 2).unflatten(2, (height, width))


def _of_pixels(mixer: nn.Module, channels: int) -> ee.Source:
    free = {"image": {0: "batch", 2: "height", 3: "width"}}
    return ee.Source(OfPixels(mixer), (torch.randn(2, channels, 5, 6),), free)


def mambavision() -> ee.Source:
    torch.manual_seed(0)
    return _of_pixels(MambaVisionMixer(), 24)


def vim() -> ee.Source:
    torch.manual_seed(0)
    return _of_pixels(VimMixer(), 16)


def vmamba() -> ee.Source:
    torch.manual_seed(0)
    return ee.Source(SS2D(), (torch.randn(2, 5, 6, 16),), {"x": {0: "batch", 1: "height", 2: "width"}})
