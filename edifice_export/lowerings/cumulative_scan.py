"""edifice::CumulativeScan, see edifice_reference.ops.cumulative_scan."""

from onnxscript import script

from edifice_reference.ops import cumulative_scan

from .domain import EDIFICE, op
from .lowering import Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def CumulativeScan(x, log_decay, b, c, epsilon: float):
    """A masked matrix product of sequence by sequence for each group, as in attention: all channels share it."""
    length = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    frames = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    column = op.Unsqueeze(frames, op.Constant(value_ints=[1]))
    steps = op.Unsqueeze(op.CastLike(column + op.Constant(value_int=1), x), op.Constant(value_ints=[2]))
    product = op.Exp(steps * log_decay)
    queries = op.Squeeze(op.Shape(c, start=1, end=2), op.Constant(value_ints=[0]))
    read_at = op.Range(length - queries, length, op.Constant(value_int=1))
    key = b / (product + op.CastLike(op.Constant(value_float=epsilon), x))
    scores = op.MatMul(
        op.Transpose(c * op.Gather(product, read_at), perm=[0, 2, 1, 3]), op.Transpose(key, perm=[0, 2, 3, 1])
    )
    nothing = op.CastLike(op.Constant(value_float=0.0), x)
    past = op.Where(op.LessOrEqual(frames, op.Unsqueeze(read_at, op.Constant(value_ints=[1]))), scores, nothing)
    return op.Transpose(op.MatMul(past, op.Unsqueeze(x, op.Constant(value_ints=[1]))), perm=[0, 2, 1, 3])


register(cumulative_scan, (Lowering("masked", CumulativeScan),))
