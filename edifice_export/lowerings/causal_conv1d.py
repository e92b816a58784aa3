"""edifice::CausalConv1d, see edifice_reference.ops.causal_conv1d."""

from onnxscript import script

from edifice_reference.ops import causal_conv1d

from .domain import EDIFICE, op
from .lowering import Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def Convolved(seen, weight, bias, groups: int):
    """A grouped Conv of frames [batch, frames, channels], as of an image of one row: faster than Conv of one axis."""
    row = op.Constant(value_ints=[2])
    image = op.Unsqueeze(op.Transpose(seen, perm=[0, 2, 1]), row)
    # Attributes that equal the defaults are written out: some web builds fail without them.
    y = op.Conv(
        image, op.Unsqueeze(weight, row), bias, group=groups, dilations=[1, 1], strides=[1, 1], pads=[0, 0, 0, 0]
    )
    return op.Transpose(op.Squeeze(y, row), perm=[0, 2, 1])


@script(EDIFICE, default_opset=op)
def CausalConv1d(x, weight, bias, groups: int):
    """Zeros before the first frame."""
    one = op.Constant(value_ints=[1])
    before = op.Shape(weight, start=2, end=3) - one
    pads = op.Concat(op.Constant(value_ints=[0]), before, op.Constant(value_ints=[0, 0, 0, 0]), axis=0)
    seen = op.Pad(x, pads)
    final = op.Slice(seen, op.Shape(x, start=1, end=2), op.Shape(seen, start=1, end=2), one)
    return Convolved(seen, weight, bias, groups), final


@script(EDIFICE, default_opset=op)
def CausalConv1dFrom(x, weight, bias, past, groups: int):
    """The past before the first frame."""
    start = op.Expand(past, op.Concat(op.Shape(x, start=0, end=1), op.Shape(past, start=1, end=3), axis=0))
    seen = op.Concat(start, x, axis=1)
    one = op.Constant(value_ints=[1])
    final = op.Slice(seen, op.Shape(x, start=1, end=2), op.Shape(seen, start=1, end=2), one)
    return Convolved(seen, weight, bias, groups), final


@script(EDIFICE, default_opset=op)
def CausalConv1dFrame(x, weight, bias, past, groups: int):
    """A product of taps and frames. Each entry has its own past: one for all of them can't be put before frames."""
    one = op.Constant(value_ints=[1])
    seen = op.Concat(past, op.Unsqueeze(x, one), axis=1)
    taps = op.Transpose(op.Squeeze(weight, one), perm=[1, 0])
    y = op.ReduceSum(seen * taps, one, keepdims=0) + bias
    final = op.Slice(seen, one, op.Constant(value_ints=[2147483647]), one)
    return y, final


register(
    causal_conv1d,
    (
        Lowering("conv", CausalConv1d),
        Lowering("conv", CausalConv1dFrom),
        Lowering("frame", CausalConv1dFrame, is_frame=True),
    ),
)
