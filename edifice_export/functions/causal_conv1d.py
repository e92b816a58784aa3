"""edifice::CausalConv1d, see edifice_reference.ops.causal_conv1d."""

from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["CausalConv1d", "CausalConv1dFrame"]


@script(EDIFICE, default_opset=op)
def CausalConv1d(x, weight, bias, past, groups: int):
    """A grouped Conv over the sequence with the past before it."""
    start = op.Expand(past, op.Concat(op.Shape(x, start=0, end=1), op.Shape(past, start=1, end=3), axis=0))
    seen = op.Concat(start, x, axis=1)
    # Attributes that equal the defaults are written out: some web builds fail without them.
    y = op.Conv(op.Transpose(seen, perm=[0, 2, 1]), weight, bias, group=groups, dilations=[1], strides=[1], pads=[0, 0])
    one = op.Constant(value_ints=[1])
    final = op.Slice(seen, op.Shape(x, start=1, end=2), op.Shape(seen, start=1, end=2), one)
    return op.Transpose(y, perm=[0, 2, 1]), final


@script(EDIFICE, default_opset=op)
def CausalConv1dFrame(x, weight, bias, past, groups: int):
    """A product of taps and frames. Each entry has its own past: one for all of them can't be put before frames."""
    one = op.Constant(value_ints=[1])
    seen = op.Concat(past, op.Unsqueeze(x, one), axis=1)
    taps = op.Transpose(op.Squeeze(weight, one), perm=[1, 0])
    y = op.ReduceSum(seen * taps, one, keepdims=0) + bias
    final = op.Slice(seen, one, op.Constant(value_ints=[2147483647]), one)
    return y, final
