"""edifice::GatedDeltaRule, see edifice_reference.ops.gated_delta_rule.

What frames of a chunk learn depends on what those before them did: with what is left of key s in the view of key t in a
matrix A, (I + A) u = beta * (value - what the state before the chunk gives). The inverse is made once for all chunks.

Where beta is 2, no key is new and nothing decays, the state is reflected for ever and rounding adds up: of 300 such
frames to 1.2e-5 of the largest number in chunks, to 1.2e-6 by the scan.
"""

from onnxscript import graph, script

from edifice_reference.ops import gated_delta_rule

from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .matrix_state import FromChunks, InChunks, ScoresByHead, SplitDecay, by_head
from .registry import register


@script(EDIFICE, default_opset=op)
def GatedDeltaRuleScan(query, key, value, log_decay, beta, initial):
    """A Scan over time."""
    start = op.Expand(initial, op.Concat(op.Shape(value, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0))
    rows = op.Constant(value_ints=[3])
    columns = op.Constant(value_ints=[4])
    kept, change = SplitDecay(log_decay)
    key_rows = op.Unsqueeze(key, rows)

    @graph()
    def step(state, q, k, k_column, v, b, kept_t, change_t):
        decayed = kept_t * state + change_t * state
        learnt = b * (v - op.MatMul(k, decayed))
        after = decayed + k_column * learnt
        y_t = op.MatMul(q, after)
        return after, y_t

    final, y = op.Scan(
        start,
        op.Unsqueeze(query, rows),
        key_rows,
        op.Unsqueeze(key, columns),
        op.Unsqueeze(value, rows),
        op.Unsqueeze(beta, op.Constant(value_ints=[3, 4])),
        op.Unsqueeze(kept, columns),
        op.Unsqueeze(change, columns),
        body=step,
        num_scan_inputs=7,
        scan_input_axes=[1, 1, 1, 1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return op.Squeeze(y, rows), final


@script(EDIFICE, default_opset=op)
def JoinedInverses(inverses, lower, size: int):
    """From the inverses of blocks of I + lower on its diagonal those of blocks of twice the size: of [[P, 0], [R, Q]]
    it is [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]. Only inverses are multiplied, which are bounded as the recurrence is; where
    keys are alike, powers of a matrix would lose everything.
    """
    axis0 = op.Constant(value_ints=[0])
    length = op.Squeeze(op.Shape(lower, start=-1), axis0)
    frames = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    block = frames / op.Constant(value_int=size)
    pair = block / op.Constant(value_int=2)
    column = op.Constant(value_ints=[1])
    is_below = op.And(op.Equal(op.Unsqueeze(pair, column), pair), op.Greater(op.Unsqueeze(block, column), block))
    below = lower * op.CastLike(is_below, lower)
    return inverses - op.MatMul(op.MatMul(inverses, below), inverses)


@script(EDIFICE, default_opset=op)
def GatedDeltaRuleChunked(query, key, value, log_decay, beta, initial):
    """Chunks of 32 frames and a Scan over them, with a decay for each head."""
    frames = op.Constant(value_int=-2)
    q = InChunks(query, 32)
    k = InChunks(key, 32)
    v = InChunks(value, 32)
    g = InChunks(log_decay, 32)
    b = InChunks(op.Unsqueeze(beta, op.Constant(value_ints=[3])), 32)
    since = op.Exp(op.CumSum(g, frames))

    # Of the frames before each, without its own.
    seen = ScoresByHead(b * k, k, g)
    length = op.Squeeze(op.Shape(k, start=3, end=4), op.Constant(value_ints=[0]))
    places = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    column = op.Unsqueeze(places, op.Constant(value_ints=[1]))
    lower = seen * op.CastLike(op.Less(places, column), seen)
    unit = op.CastLike(op.Equal(places, column), seen)
    inverse = JoinedInverses(op.Expand(unit, op.Shape(lower)), lower, 1)
    inverse = JoinedInverses(inverse, lower, 2)
    inverse = JoinedInverses(inverse, lower, 4)
    inverse = JoinedInverses(inverse, lower, 8)
    inverse = JoinedInverses(inverse, lower, 16)

    learnt_alone = op.MatMul(inverse, b * v)
    known = op.MatMul(inverse, b * k * since)
    aged = op.Transpose(k * op.Exp(op.CumSum(g, frames, exclusive=1, reverse=1)), perm=[0, 1, 2, 4, 3])
    kept, change = SplitDecay(op.ReduceSum(g, op.Constant(value_ints=[3]), keepdims=1))
    start = op.Expand(initial, op.Concat(op.Shape(value, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0))

    @graph()
    def step(state, alone, known_c, queries, scores, keys, kept_c, change_c):
        learnt = alone - op.MatMul(known_c, state)
        y_c = op.MatMul(queries, state) + op.MatMul(scores, learnt)
        after = kept_c * state + (change_c * state + op.MatMul(keys, learnt))
        return after, y_c

    final, y = op.Scan(
        start,
        learnt_alone,
        known,
        q * since,
        ScoresByHead(q, k, g),
        aged,
        kept,
        change,
        body=step,
        num_scan_inputs=7,
        scan_input_axes=[2, 2, 2, 2, 2, 2, 2],
        scan_output_axes=[2],
    )
    return FromChunks(y, value), final


@script(EDIFICE, default_opset=op)
def GatedDeltaRuleFrame(query, key, value, log_decay, beta, initial):
    """The step alone."""
    row = op.Constant(value_ints=[2])
    column = op.Constant(value_ints=[3])
    kept, change = SplitDecay(op.Unsqueeze(log_decay, column))
    decayed = kept * initial + change * initial
    known = op.MatMul(op.Unsqueeze(key, row), decayed)
    learnt = op.Unsqueeze(beta, op.Constant(value_ints=[2, 3])) * (op.Unsqueeze(value, row) - known)
    final = decayed + op.Unsqueeze(key, column) * learnt
    y = op.Squeeze(op.MatMul(op.Unsqueeze(query, row), final), row)
    return y, final


def _prefer(call: Call) -> tuple[str, str]:
    if by_head(call):
        return "chunked", "a decay for each head"
    return "scan", "a decay for each channel of a key"


register(
    gated_delta_rule,
    (
        Lowering("chunked", GatedDeltaRuleChunked, takes=by_head),
        Lowering("scan", GatedDeltaRuleScan),
        Lowering("frame", GatedDeltaRuleFrame, is_frame=True),
    ),
    _prefer,
)
