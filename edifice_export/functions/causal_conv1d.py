"""edifice::CausalConv1d, see edifice_reference.ops.causal_conv1d."""

from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["CausalConv1d"]


@script(EDIFICE, default_opset=op)
def CausalConv1d(x, weight, bias, groups: int):
    """A grouped Conv over the sequence padded with kernel - 1 zeros on the left."""
    zero = op.Constant(value_ints=[0])
    past = op.Sub(op.Shape(weight, start=2, end=3), op.Constant(value_ints=[1]))
    pads = op.Concat(zero, zero, past, zero, zero, zero, axis=0)
    padded = op.Pad(op.Transpose(x, perm=[0, 2, 1]), pads)
    # Attributes that equal the defaults are written out: some web builds fail without them.
    y = op.Conv(padded, weight, bias, group=groups, dilations=[1], strides=[1], pads=[0, 0])
    return op.Transpose(y, perm=[0, 2, 1])
