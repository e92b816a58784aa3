"""Hyena: long convolutions whose kernels a small network writes, and gates between them, in place of attention.

    state_sequence [B, T, E]
          |
    input_projection                absent if E == D
          |
    +-> norm -> conv -> proj -> v, x_1, ..., x_order
    |                           |
    |                           y = v
    |                           y = long_conv(y, filter_j) * x_j     for j = 1 to order
    |                           |
    +------------- + <------ out_proj
    |              |                                                 num_layers times
    +-> ffn_norm -> ffn -> +
                           |
    final_norm, last timestep -> output [B, D]

A convolution as long as the window lets every frame reach every later one; multiplying by a gate between two of them
makes the whole depend on the input as attention's weights do. The kernels are not free parameters: a network of three
layers with sines maps each position of the window to a tap for each channel, so their number does not grow with the
window, and they do not depend on the input.

The kernels are made for one window: positions are spread from 0 to 1 over its S frames. A shorter sequence uses their
first taps; a longer one can't be computed.

    B  batch              T  sequence (frames), at most S    E  embed_dim
    D  hidden_size        S  window_size                     F  filter_size

References:
    Edifice.SSM.Hyena, whose block this is: no skip term, no window function on the kernels.
    Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, arXiv 2302.10866.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .backbone import Backbone
from .config import Numerics
from .hyena_config import CONV_SIZE, HyenaConfig
from .layers import CausalConv1d, GatedFeedForward, LayerNorm
from .state import State, input_free

__all__ = ["EDIFICE_NAMES", "Hyena", "HyenaConfig"]


EDIFICE_NAMES = {
    "input_projection": "input_projection",
    "blocks.{}.norm": "hyena_block_{}_norm",
    "blocks.{}.conv": "hyena_block_{}_short_dw_conv",
    "blocks.{}.proj": "hyena_block_{}_proj",
    "blocks.{}.filters.[].dense1": "hyena_block_{}_filter[]_dense1",
    "blocks.{}.filters.[].dense2": "hyena_block_{}_filter[]_dense2",
    "blocks.{}.filters.[].dense3": "hyena_block_{}_filter[]_dense3",
    "blocks.{}.out_proj": "hyena_block_{}_out_proj",
    "blocks.{}.ffn_norm": "hyena_block_{}_ffn_norm",
    "blocks.{}.ffn.gate": "hyena_block_{}_ffn_gate",
    "blocks.{}.ffn.up": "hyena_block_{}_ffn_up",
    "blocks.{}.ffn.down": "hyena_block_{}_ffn_down",
    "final_norm": "final_norm",
}
"""Edifice's layer of each module; {} is the block, from 0 here and from 1 there; [] the filter, from 0 in both."""


class ImplicitFilter(nn.Module):
    """A network from positions to taps: dense, sine, dense, sine, dense. It takes no input: it makes one filter."""

    positions: Tensor

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        f = config.filter_size
        self.dense1 = nn.Linear(1, f)
        self.dense2 = nn.Linear(f, f)
        self.dense3 = nn.Linear(f, config.hidden_size)
        # In float32 whatever the model computes in, as Edifice has them.
        steps = torch.arange(config.window_size, dtype=torch.float32)
        self.register_buffer("positions", (steps / max(config.window_size - 1, 1))[:, None], persistent=False)

    @input_free
    def forward(self) -> Tensor:
        """[S, D], the current frame's tap first."""
        return self.dense3(torch.sin(self.dense2(torch.sin(self.dense1(self.positions)))))


class Block(nn.Module):
    """x + out_proj(gated long convolutions of conv(norm(x))), then x + ffn(ffn_norm(x))."""

    def __init__(self, config: HyenaConfig, numerics: Numerics) -> None:
        super().__init__()
        d = config.hidden_size
        self.window_size = config.window_size
        self.norm = LayerNorm(d, numerics)
        self.conv = CausalConv1d(d, CONV_SIZE)
        self.proj = nn.Linear(d, (config.order + 1) * d)
        self.filters = nn.ModuleList(ImplicitFilter(config) for _ in range(config.order))
        self.out_proj = nn.Linear(d, d)
        self.ffn_norm = LayerNorm(d, numerics)
        self.ffn = GatedFeedForward(d)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, batch: int) -> State:
        """`conv`, and `long_conv`: what the convolution of each order has seen, the oldest frame first; zero.

        One frame at least, that of a window of one frame out of reach: it tells a stream from a window.
        """
        order, channels = len(self.filters), self.out_proj.weight.shape[0]
        history = self.out_proj.weight.new_zeros(batch, order, max(self.window_size - 1, 1), channels)
        return {**self.conv.initial_state(batch), "long_conv": history}

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """[B, T, D], or with a state also [B, D], of the same shape -> and the state after it."""
        projected, conv = self.conv(self.norm(x), past)
        v, *gates = self.proj(projected).chunk(len(self.filters) + 1, dim=-1)
        kernels = [make_filter() for make_filter in self.filters]
        if "long_conv" not in past:
            y, history = convolve_window(v, gates, kernels), {}
        else:
            convolve = convolve_frame if x.ndim == 2 else convolve_piece
            y, long_conv = convolve(v, gates, kernels, past["long_conv"])
            history = {"long_conv": long_conv}
        x = x + self.dropout(self.out_proj(y))
        return x + self.dropout(self.ffn(self.ffn_norm(x))), conv | history


def convolve_window(v: Tensor, gates: list[Tensor], kernels: list[Tensor]) -> Tensor:
    """The Hyena operator: y = long_conv(y, kernel_j) * gate_j for each order, y = v at first; of v [B, T, D]."""
    for gate, kernel in zip(gates, kernels, strict=True):
        v = ops.fft_conv(v, kernel) * gate
    return v


def convolve_piece(v: Tensor, gates: list[Tensor], kernels: list[Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """The Hyena operator on a sequence of any length that goes on from a history.

    Args:
        v: [B, T, D].
        gates: of each order, [B, T, D].
        kernels: of each order, [S, D].
        past: [B, order, S - 1 or 1, D].

    Returns:
        [B, T, D], and the history after it.
    """
    length, histories = v.shape[1], []
    for order, (gate, kernel) in enumerate(zip(gates, kernels, strict=True)):
        seen = torch.cat([past[:, order], v], dim=1)
        # What is further back than the window is out of reach: taps of zero for it.
        beyond = torch.zeros_like(v[0])
        histories.append(seen[:, length:])
        v = ops.fft_conv(seen, torch.cat([kernel, beyond]))[:, past.shape[2] :] * gate
    return v, torch.stack(histories, dim=1)


def convolve_frame(v: Tensor, gates: list[Tensor], kernels: list[Tensor], past: Tensor) -> tuple[Tensor, Tensor]:
    """The Hyena operator on one frame: as convolve_piece, of v and gates [B, D].

    What the past gives to every order is one product: it does not depend on the frame.
    """
    taps = torch.stack(kernels)
    if taps.shape[1] == 1:
        taps = torch.cat([taps, torch.zeros_like(taps)], dim=1)
    remembered = (past * taps[:, 1:].flip(1)).sum(2)
    added = []
    for order, gate in enumerate(gates):
        added.append(v)
        v = (remembered[:, order] + taps[order, 0] * v) * gate
    return v, torch.cat([past[:, :, 1:], torch.stack(added, dim=1)[:, :, None]], dim=2)


class Hyena(Backbone):
    """Hyena, from a window of frames to one output.

    Args:
        config: the options.
        numerics: `standard` for the mathematics, `edifice` for Edifice's layer norm.
    """

    def __init__(self, config: HyenaConfig, numerics: Numerics = "standard") -> None:
        super().__init__(config, numerics, lambda: Block(config, numerics))
