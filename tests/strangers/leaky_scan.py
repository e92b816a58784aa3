"""A stranger's op: all that there is of it is in this file."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset
from torch import Tensor, nn

import edifice_export as ee

MINE = Opset("mine", 1)


@script(MINE, default_opset=op)
def LastFrames(h, like):  # noqa: N802
    """As many of the last frames of h as there are of another sequence."""
    one = op.Constant(value_ints=[1])
    end = op.Shape(h, start=1, end=2)
    return op.Slice(h, end - op.Shape(like, start=1, end=2), end, one)


@script(MINE, default_opset=op)
def LeakyLoop(x, decay, c, initial, gain: float):  # noqa: N802
    """A Scan over time."""
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3), axis=0))
    inputs = x * op.CastLike(op.Constant(value_float=gain), x)

    @graph()
    def step(h, x_t):
        h_next = decay * h + x_t
        return h_next, op.Identity(h_next)

    final, h = op.Scan(start, inputs, body=step, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1])
    return c * LastFrames(h, c), final


@script(MINE, default_opset=op)
def LeakyPowers(x, decay, c, gain: float):  # noqa: N802
    """From zeros, all at once: what is left of frame s at frame t is a power of the decay."""
    length = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    frames = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    age = op.Unsqueeze(frames, op.Constant(value_ints=[1])) - frames
    is_past = op.CastLike(op.GreaterOrEqual(age, op.Constant(value_int=0)), x)
    waited = op.Unsqueeze(op.Relu(op.CastLike(age, x)), op.Constant(value_ints=[0]))
    rows = op.Unsqueeze(decay, op.Constant(value_ints=[1, 2]))
    weights = op.Pow(rows, waited) * is_past
    columns = op.Unsqueeze(op.Transpose(x, perm=[0, 2, 1]), op.Constant(value_ints=[3]))
    mixed = op.Transpose(op.Squeeze(op.MatMul(weights, columns), op.Constant(value_ints=[3])), perm=[0, 2, 1])
    h = mixed * op.CastLike(op.Constant(value_float=gain), x)
    return c * LastFrames(h, c), op.Gather(h, op.Constant(value_int=-1), axis=1)


@script(MINE, default_opset=op)
def LeakyFrame(x, decay, c, initial, gain: float):  # noqa: N802
    """The step alone."""
    final = decay * initial + x * op.CastLike(op.Constant(value_float=gain), x)
    return c * final, final


def shapes(x: Tensor, decay: Tensor, c: Tensor, gain: float, initial: Tensor | None) -> Any:  # noqa: ARG001
    return c.shape, (x.shape[0], x.shape[-1])


def case(draw: Any, n: Any) -> dict[str, Any]:
    frames = (n["batch"], n["sequence"], n["channels"])
    return {
        "x": draw(*frames),
        "decay": torch.sigmoid(draw(n["channels"])),
        "c": draw(*frames),
        "gain": 0.5,
        "initial": draw(n["batch"], n["channels"]),
    }


def prefer(call: ee.Call) -> tuple[str, str]:
    length = call.size(0, 1)
    if length is not None and length <= 32:
        return "powers", f"{length} frames, at most 32"
    return "loop", "any number of frames" if length is None else f"{length} frames, more than 32"


@ee.op(
    "mine::leaky_scan",
    bodies=[
        ee.Lowering("loop", LeakyLoop),
        ee.Lowering("powers", LeakyPowers),
        ee.Lowering("frame", LeakyFrame, is_frame=True),
    ],
    prefer=prefer,
    shapes=shapes,
    streamed=["x", "c"],
    states=["initial"],
    read_out="c",
    cases=[case],
)
def leaky_scan(
    x: Tensor, decay: Tensor, c: Tensor, gain: float = 1.0, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A leaky integrator that is read out.

        h_t[c] = decay[c] * h_{t-1}[c] + gain * x_t[c]        h_0 = initial
        y_t[c] = c_t[c] * h_t[c]

    Args:
        x: [batch, sequence, channels], or one frame [batch, channels]; so for c.
        decay: what is left of the state after a frame [channels].
        c: read-out weights, of all frames or the last ones [batch, queries, channels].
        gain: of the input.
        initial: the state before the first frame [batch or 1, channels].

    Returns:
        y [batch, queries, channels] and the state after the last frame [batch, channels].
    """
    h = x.new_zeros(x.shape[0], x.shape[2]) if initial is None else initial.expand(x.shape[0], -1)
    states = []
    for t in range(x.shape[1]):
        h = decay * h + gain * x[:, t]
        states.append(h)
    return c * torch.stack(states[-c.shape[1] :], dim=1), h.clone(memory_format=torch.contiguous_format)


class Leaky(nn.Module):
    """A layer around it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.decay = nn.Parameter(torch.linspace(0.1, 0.9, width))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = leaky_scan(self.dense(x), self.decay, torch.tanh(x), gain=0.5)
        return y


def leaky() -> ee.Source:
    torch.manual_seed(0)
    return ee.Source(Leaky(), (torch.randn(2, 6, 4),), {"x": {0: "batch", 1: "sequence"}})
