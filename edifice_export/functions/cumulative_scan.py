"""edifice::CumulativeScan, see edifice_reference.ops.cumulative_scan."""

from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["CumulativeScan"]


@script(EDIFICE, default_opset=op)
def CumulativeScan(x, log_decay, b, c, epsilon: float):
    """A masked matrix product of sequence by sequence, as in attention: all channels share it."""
    length = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    frames = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    column = op.Unsqueeze(frames, op.Constant(value_ints=[1]))
    steps = op.CastLike(column + op.Constant(value_int=1), x)
    product = op.Exp(steps * log_decay)
    key = b / (product + op.CastLike(op.Constant(value_float=epsilon), x))
    scores = op.MatMul(c * product, op.Transpose(key, perm=[0, 2, 1]))
    nothing = op.CastLike(op.Constant(value_float=0.0), x)
    return op.MatMul(op.Where(op.LessOrEqual(frames, column), scores, nothing), x)
