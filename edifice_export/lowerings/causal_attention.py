"""edifice::CausalAttention, see edifice_reference.ops.causal_attention."""

from onnxscript import graph, script

from edifice_reference.ops import causal_attention

from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def AttendMasked(query, key, value, num_heads: int, epsilon: float):
    """Masked matrix products.

    Epsilon is at most MAX_ATTENTION_EPSILON, which float32 and float16 can't add to a denominator of at least 1: the
    plain softmax gives the same numbers.
    """
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, [-1], axis=0)
    q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    # Of constants: a runtime makes it a factor of the product.
    scale = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=2, end=3) / heads, query)))
    scores = op.MatMul(q, k) * scale

    one = op.Constant(value_int=1)
    zero = op.Constant(value_int=0)
    axis0 = op.Constant(value_ints=[0])
    length = op.Squeeze(op.Shape(query, start=1, end=2), axis0)
    seen = op.Squeeze(op.Shape(key, start=1, end=2), axis0)
    last_visible = op.Unsqueeze(op.Range(op.Sub(seen, length), seen, one), op.Constant(value_ints=[1]))
    visible = op.LessOrEqual(op.Range(zero, seen, one), last_visible)
    nothing = op.CastLike(op.Constant(value_float=0.0), query)
    hidden = op.CastLike(op.Constant(value_float=float("-inf")), query)
    weights = op.Softmax(scores + op.Where(visible, nothing, hidden), axis=-1)

    mixed = op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])
    return op.Reshape(mixed, op.Constant(value_ints=[0, 0, -1]))


@script(EDIFICE, default_opset=op)
def AttendBlocks(query, key, value, num_heads: int, epsilon: float):
    """A Scan over blocks of 64 queries, each of which sees the keys up to its end: half of all products, and memory
    for scores that grows as the length does.

    Keys and values are carried along as states: OpenVINO can't convert a body that captures what was computed.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_int=1)
    size = op.Constant(value_ints=[64])
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, [-1], axis=0)
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    scale = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=2, end=3) / heads, query)))

    length = op.Shape(query, start=1, end=2)
    missing = (size - length % size) % size
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, zero, axis=0)
    blocks = op.Concat(zero, (length + missing) / size, size, heads, op.Constant(value_ints=[-1]), axis=0)
    q = op.Transpose(op.Reshape(op.Pad(query * scale, pads), blocks), perm=[0, 3, 1, 2, 4])
    seen = op.Shape(key, start=1, end=2)
    count = op.Squeeze((length + missing) / size, zero)
    starts = op.Range(op.Constant(value_int=0), count, one) * op.Constant(value_int=64) + (seen - length)

    @graph()
    def step(k_all, v_all, q_t, start_t):
        begin = op.Constant(value_ints=[0])
        heads_axis = op.Constant(value_ints=[2])
        step_one = op.Constant(value_int=1)
        end = op.Min(
            op.Reshape(start_t, op.Constant(value_ints=[1])) + op.Constant(value_ints=[64]),
            op.Shape(k_all, start=2, end=3),
        )
        keys = op.Slice(k_all, begin, end, heads_axis)
        values = op.Slice(v_all, begin, end, heads_axis)
        scores = op.MatMul(q_t, op.Transpose(keys, perm=[0, 1, 3, 2]))
        rows = op.Range(start_t, start_t + op.Constant(value_int=64), step_one)
        columns = op.Range(op.Constant(value_int=0), op.Squeeze(end, begin), step_one)
        visible = op.LessOrEqual(columns, op.Unsqueeze(rows, op.Constant(value_ints=[1])))
        nothing = op.CastLike(op.Constant(value_float=0.0), q_t)
        hidden = op.CastLike(op.Constant(value_float=float("-inf")), q_t)
        weights = op.Softmax(scores + op.Where(visible, nothing, hidden), axis=-1)
        mixed = op.MatMul(weights, values)
        return op.Identity(k_all), op.Identity(v_all), mixed

    _k, _v, y = op.Scan(k, v, q, starts, body=step, num_scan_inputs=2, scan_input_axes=[2, 0], scan_output_axes=[1])
    flat = op.Concat(zero, op.Constant(value_ints=[-1]), op.Shape(query, start=2, end=3), axis=0)
    whole = op.Reshape(op.Transpose(y, perm=[0, 1, 3, 2, 4]), flat)
    return op.Slice(whole, zero, length, op.Constant(value_ints=[1]))


@script(EDIFICE, default_opset=op)
def CausalAttention(query, key, value, num_heads: int, epsilon: float):
    """All scores at once."""
    return AttendMasked(query, key, value, num_heads, epsilon)


@script(EDIFICE, default_opset=op)
def CausalAttentionBlocks(query, key, value, num_heads: int, epsilon: float):
    """In blocks."""
    return AttendBlocks(query, key, value, num_heads, epsilon)


@script(EDIFICE, default_opset=op)
def CausalAttentionEither(query, key, value, num_heads: int, epsilon: float):
    """All at once up to 256 queries and in blocks above: a graph for a short window may be given more."""
    queries = op.Squeeze(op.Shape(query, start=1, end=2), op.Constant(value_ints=[0]))
    if op.LessOrEqual(queries, op.Constant(value_int=256)):
        y = AttendMasked(query, key, value, num_heads, epsilon)
    else:
        y = AttendBlocks(query, key, value, num_heads, epsilon)
    return y


MASKED = 256
"""Crossover on a CPU, one thread, in CausalAttentionEither too: see `python benchmarks/ops.py causal_attention`. Blocks
cost at most 0.04 ms more below it."""


def _prefer(call: Call) -> tuple[str, str]:
    queries = call.size(0, 1)
    if queries == 1:
        return "masked", "a single query"
    if not call.scans:
        return "masked", f"{call.target} is no good at Scan"
    if queries is None:
        return "blocks", "any number of queries"
    if queries > MASKED:
        return "blocks", f"{queries} queries, more than {MASKED}"
    # A graph for a short window may be given more, of which all scores at once would take memory as its square.
    if call.target == "cpu":
        return "either", f"{queries} queries, at most {MASKED}"
    # OpenVINO computes that branch wrongly, in models that have it more than once.
    return "blocks", f"{queries} queries, and no branch for {call.target}"


register(
    causal_attention,
    (
        Lowering("masked", CausalAttention),
        Lowering("either", CausalAttentionEither),
        Lowering("blocks", CausalAttentionBlocks),
    ),
    _prefer,
)
