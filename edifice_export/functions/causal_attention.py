"""edifice::CausalAttention, see edifice_reference.ops.causal_attention."""

from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["CausalAttention"]


@script(EDIFICE, default_opset=op)
def CausalAttention(query, key, value, num_heads: int, epsilon: float):
    """Masked matrix products.

    Epsilon is at most MAX_ATTENTION_EPSILON, which float32 and float16 can't add to a denominator of at least 1: the
    plain softmax gives the same numbers.
    """
    heads = op.Constant(value_int=num_heads)
    split = op.Concat(op.Constant(value_ints=[0, 0]), op.Reshape(heads, op.Constant(value_ints=[1])), [-1], axis=0)
    q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    width = op.CastLike(op.Shape(q, start=3, end=4), query)
    scores = op.Div(op.MatMul(q, k), op.Sqrt(width))

    one = op.Constant(value_int=1)
    zero = op.Constant(value_int=0)
    axis0 = op.Constant(value_ints=[0])
    length = op.Squeeze(op.Shape(query, start=1, end=2), axis0)
    seen = op.Squeeze(op.Shape(key, start=1, end=2), axis0)
    last_visible = op.Unsqueeze(op.Range(op.Sub(seen, length), seen, one), op.Constant(value_ints=[1]))
    visible = op.LessOrEqual(op.Range(zero, seen, one), last_visible)
    hidden = op.CastLike(op.Constant(value_float=float("-inf")), query)
    weights = op.Softmax(op.Where(visible, scores, hidden), axis=-1)

    mixed = op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])
    return op.Reshape(mixed, op.Constant(value_ints=[0, 0, -1]))
