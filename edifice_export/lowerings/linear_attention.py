"""edifice::LinearAttention, see edifice_reference.ops.linear_attention."""

from onnxscript import graph, script

from edifice_reference.ops import linear_attention

from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .matrix_state import BetweenFrames, FromChunks, InChunks, ScoresByHead, ScoresByKey, SplitDecay, by_head
from .registry import register


@script(EDIFICE, default_opset=op)
def LinearAttentionScan(query, key, value, log_decay, initial):
    """A Scan over time. On a CPU ScoresByKey is slower: see `python benchmarks/ops.py linear_attention`."""
    start = op.Expand(initial, op.Concat(op.Shape(value, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0))
    rows = op.Constant(value_ints=[3])
    columns = op.Constant(value_ints=[4])
    kept, change = SplitDecay(log_decay)

    @graph()
    def step(state, q, k, v, kept_t, change_t):
        after = kept_t * state + (change_t * state + k * v)
        y_t = op.MatMul(q, after)
        return after, y_t

    final, y = op.Scan(
        start,
        op.Unsqueeze(query, rows),
        op.Unsqueeze(key, columns),
        op.Unsqueeze(value, rows),
        op.Unsqueeze(kept, columns),
        op.Unsqueeze(change, columns),
        body=step,
        num_scan_inputs=5,
        scan_input_axes=[1, 1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return op.Squeeze(y, rows), final


@script(EDIFICE, default_opset=op)
def StatesOfChunks(key, value, log_decay, initial):
    """The states before each chunk [batch, heads, chunks, key width, value width] and after the last one."""
    frames = op.Constant(value_int=-2)
    axis2 = op.Constant(value_ints=[2])
    aged = key * op.Exp(op.CumSum(log_decay, frames, exclusive=1, reverse=1))
    added = op.MatMul(op.Transpose(aged, perm=[0, 1, 2, 4, 3]), value)
    # Between chunks as between frames, for each channel of a key: [batch, heads, key width, chunks, ...].
    total = op.Transpose(op.ReduceSum(log_decay, op.Constant(value_ints=[3]), keepdims=1), perm=[0, 1, 4, 2, 3])
    by_key = op.Transpose(added, perm=[0, 1, 3, 2, 4])
    kept = op.Exp(op.CumSum(total, frames)) * op.Unsqueeze(initial, op.Constant(value_ints=[3]))
    after = op.Transpose(op.MatMul(BetweenFrames(total), by_key) + kept, perm=[0, 1, 3, 2, 4])
    batch = op.Concat(op.Shape(after, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0)
    first = op.Unsqueeze(op.Expand(initial, batch), axis2)
    last = op.Constant(value_ints=[-1])
    before = op.Slice(op.Concat(first, after, axis=2), op.Constant(value_ints=[0]), last, axis2)
    return before, op.Gather(after, op.Constant(value_int=-1), axis=2)


@script(EDIFICE, default_opset=op)
def LinearAttentionChunked(query, key, value, log_decay, initial):
    """Chunks of 64 frames, with a decay for each head."""
    q = InChunks(query, 64)
    k = InChunks(key, 64)
    v = InChunks(value, 64)
    decays = InChunks(log_decay, 64)
    before, final = StatesOfChunks(k, v, decays, initial)
    within = op.MatMul(ScoresByHead(q, k, decays), v)
    earlier = op.MatMul(q * op.Exp(op.CumSum(decays, op.Constant(value_int=-2))), before)
    return FromChunks(within + earlier, value), final


@script(EDIFICE, default_opset=op)
def LinearAttentionChunkedByKey(query, key, value, log_decay, initial):
    """Chunks of 16 frames, with a decay for each channel of a key."""
    q = InChunks(query, 16)
    k = InChunks(key, 16)
    v = InChunks(value, 16)
    decays = InChunks(log_decay, 16)
    before, final = StatesOfChunks(k, v, decays, initial)
    within = op.MatMul(ScoresByKey(q, k, decays), v)
    earlier = op.MatMul(q * op.Exp(op.CumSum(decays, op.Constant(value_int=-2))), before)
    return FromChunks(within + earlier, value), final


@script(EDIFICE, default_opset=op)
def LinearAttentionFrame(query, key, value, log_decay, initial):
    """The step alone."""
    row = op.Constant(value_ints=[2])
    column = op.Constant(value_ints=[3])
    kept, change = SplitDecay(op.Unsqueeze(log_decay, column))
    final = kept * initial + (change * initial + op.Unsqueeze(key, column) * op.Unsqueeze(value, row))
    y = op.Squeeze(op.MatMul(op.Unsqueeze(query, row), final), row)
    return y, final


def _prefer(call: Call) -> tuple[str, str]:
    if by_head(call):
        return "chunked", "a decay for each head"
    if call.scans:
        return "scan", "a decay for each channel of a key"
    return "chunked_by_key", f"a decay for each channel of a key, and {call.target} is no good at Scan"


register(
    linear_attention,
    (
        Lowering("chunked", LinearAttentionChunked, takes=by_head),
        Lowering("chunked_by_key", LinearAttentionChunkedByKey, takes=lambda call: not by_head(call)),
        Lowering("scan", LinearAttentionScan),
        Lowering("frame", LinearAttentionFrame, is_frame=True),
    ),
    _prefer,
)
