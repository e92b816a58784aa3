"""edifice::SlidingAttention, see edifice_reference.ops.sliding_attention.

Epsilon is left out, see CausalAttention.
"""

from onnxscript import script

from edifice_reference.ops import sliding_attention

from .domain import EDIFICE, op
from .lowering import Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def InOrder(ring, new, position):
    """A ring's frames, the oldest first, and the new ones behind: [batch, heads, window + sequence, head width]."""
    zero = op.Constant(value_int=0)
    window = op.Squeeze(op.Shape(ring, start=2, end=3), op.Constant(value_ints=[0]))
    frames = op.Range(zero, window, op.Constant(value_int=1))
    slots = op.Mod(op.Unsqueeze(position, op.Constant(value_ints=[1])) + frames, window)
    every = op.Expand(op.Unsqueeze(slots, op.Constant(value_ints=[1, 3])), op.Shape(ring))
    heads = op.Shape(ring, start=1, end=2)
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    added = op.Transpose(op.Reshape(new, split), perm=[0, 2, 1, 3])
    return op.Concat(op.GatherElements(ring, every, axis=2), added, axis=2)


@script(EDIFICE, default_opset=op)
def InSlots(seen, ring, position):
    """What InOrder gave, as a ring again: in each slot the last frame whose place it is."""
    zero = op.Constant(value_int=0)
    axis0 = op.Constant(value_ints=[0])
    window = op.Squeeze(op.Shape(ring, start=2, end=3), axis0)
    length = op.Squeeze(op.Shape(seen, start=2, end=3), axis0) - window
    frames = op.Range(zero, window, op.Constant(value_int=1))
    before = op.Unsqueeze(position + length, op.Constant(value_ints=[1]))
    places = op.Mod(frames - before, window) + length
    return op.GatherElements(
        seen, op.Expand(op.Unsqueeze(places, op.Constant(value_ints=[1, 3])), op.Shape(ring)), axis=2
    )


@script(EDIFICE, default_opset=op)
def InBlocks(query, ring):
    """Queries [batch, sequence, width] in blocks as long as the window, or one block of a shorter sequence:
    [batch, heads, count, size, head width], the last one filled up with zeros.
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    length = op.Shape(query, start=1, end=2)
    heads = op.Shape(ring, start=1, end=2)
    width = op.Shape(ring, start=3, end=4)
    size = op.Min(length, op.Shape(ring, start=2, end=3))
    count = (length + size - one) / size
    missing = count * size - length
    filled = op.Pad(query, op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, zero, axis=0))
    return op.Transpose(op.Reshape(filled, op.Concat(zero, count, size, heads, width, axis=0)), perm=[0, 3, 1, 2, 4])


@script(EDIFICE, default_opset=op)
def SeenByBlocks(seen, blocks, ring):
    """The frames that each block of queries sees, of InOrder's: [batch, heads, count, window + size, head width].

    With several blocks their size is the window's, so that each sees the frames of two.
    """
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_ints=[0])
    kept = op.Constant(value_ints=[0, 0])
    window = op.Shape(ring, start=2, end=3)
    count = op.Shape(blocks, start=2, end=3)
    size = op.Shape(blocks, start=3, end=4)
    width = op.Shape(ring, start=3, end=4)
    missing = window + count * size - op.Shape(seen, start=2, end=3)
    filled = op.Pad(seen, op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0, 0]), missing, zero, axis=0))
    before = op.Slice(filled, zero, count * window, two)
    own = op.Slice(filled, window, window + count * size, two)
    return op.Concat(
        op.Reshape(before, op.Concat(kept, count, window, width, axis=0)),
        op.Reshape(own, op.Concat(kept, count, size, width, axis=0)),
        axis=3,
    )


@script(EDIFICE, default_opset=op)
def BlockScores(blocks, k_seen, ring, position):
    """Scores of scaled queries in blocks [batch, heads, count, size, window + size], -inf for what is out of sight."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    column = op.Constant(value_ints=[1])
    window = op.Shape(ring, start=2, end=3)
    size = op.Squeeze(op.Shape(blocks, start=3, end=4), axis0)
    count = op.Squeeze(op.Shape(blocks, start=2, end=3), axis0)
    places = op.Range(zero, op.Squeeze(window, axis0) + size, one)
    queries = op.Unsqueeze(op.Range(zero, size, one), column)
    near = op.And(op.Less(queries, places), op.LessOrEqual(places, queries + window))
    frames = op.Unsqueeze(op.Range(zero, count, one) * size, column) + places
    first = op.Unsqueeze(window - position, op.Constant(value_ints=[1, 2, 3, 4]))
    filled = op.GreaterOrEqual(op.Unsqueeze(frames, op.Constant(value_ints=[0, 1, 3])), first)
    scores = op.MatMul(blocks, op.Transpose(k_seen, perm=[0, 1, 2, 4, 3]))
    hidden = op.CastLike(op.Constant(value_float=float("-inf")), blocks)
    return op.Where(op.And(near, filled), scores, hidden)


@script(EDIFICE, default_opset=op)
def OutOfBlocks(blocks, query):
    """InBlocks undone: [batch, sequence, width]."""
    shape = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(query, start=2, end=3), axis=0)
    joined = op.Reshape(op.Transpose(blocks, perm=[0, 2, 3, 1, 4]), shape)
    one = op.Constant(value_ints=[1])
    return op.Slice(joined, op.Constant(value_ints=[0]), op.Shape(query, start=1, end=2), one)


@script(EDIFICE, default_opset=op)
def SlidingAttention(query, key, value, past_key, past_value, position, num_heads: int, epsilon: float):
    """In blocks as long as the window, each against the frames of two, so that memory grows with T * window."""
    k_all = InOrder(past_key, key, position)
    v_all = InOrder(past_value, value, position)
    final_key = InSlots(k_all, past_key, position)
    final_value = InSlots(v_all, past_value, position)
    scale = op.Sqrt(op.CastLike(op.Shape(past_key, start=3, end=4), query))
    blocks = InBlocks(query / scale, past_key)
    scores = BlockScores(blocks, SeenByBlocks(k_all, blocks, past_key), past_key, position)
    mixed = op.MatMul(op.Softmax(scores, axis=-1), SeenByBlocks(v_all, blocks, past_key))
    y = OutOfBlocks(mixed, query)
    return y, final_key, final_value


@script(EDIFICE, default_opset=op)
def SlidingAttentionSinks(
    query, key, value, past_key, past_value, position, sink_key, sink_value, num_heads: int, epsilon: float
):
    """SlidingAttention with sinks beside the frames of every block."""
    k_all = InOrder(past_key, key, position)
    v_all = InOrder(past_value, value, position)
    final_key = InSlots(k_all, past_key, position)
    final_value = InSlots(v_all, past_value, position)
    scale = op.Sqrt(op.CastLike(op.Shape(past_key, start=3, end=4), query))
    blocks = InBlocks(query / scale, past_key)
    scores = BlockScores(blocks, SeenByBlocks(k_all, blocks, past_key), past_key, position)
    # Sinks are [heads, 1, head width, sinks] and [heads, 1, sinks, head width]: the same for all blocks.
    split = op.Concat(
        op.Shape(sink_key, end=1),
        op.Constant(value_ints=[1]),
        op.Shape(past_key, start=1, end=2),
        op.Constant(value_ints=[-1]),
        axis=0,
    )
    sink_scores = op.MatMul(blocks, op.Transpose(op.Reshape(sink_key, split), perm=[2, 1, 3, 0]))
    weights = op.Softmax(op.Concat(sink_scores, scores, axis=-1), axis=-1)
    ends = op.Concat(op.Shape(sink_scores, start=4, end=5), op.Shape(scores, start=4, end=5), axis=0)
    sink_weights, frame_weights = op.Split(weights, ends, axis=-1)
    from_sinks = op.MatMul(sink_weights, op.Transpose(op.Reshape(sink_value, split), perm=[2, 1, 0, 3]))
    y = OutOfBlocks(from_sinks + op.MatMul(frame_weights, SeenByBlocks(v_all, blocks, past_key)), query)
    return y, final_key, final_value


@script(EDIFICE, default_opset=op)
def IntoSlot(ring, new, position):
    """A ring with one new frame [batch, width] in the slot that is its position modulo window. The places of the rows
    are the same for every ring of a graph: a runtime makes them once.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    unit = op.Constant(value_ints=[1])
    heads = op.Shape(ring, start=1, end=2)
    rows = op.Concat(op.Shape(position), heads, unit, axis=0)
    entry = op.Range(zero, op.Squeeze(op.Shape(position), axis0), one)
    head = op.Range(zero, op.Squeeze(heads, axis0), one)
    slot = op.Mod(position, op.Shape(ring, start=2, end=3))
    places = op.Concat(
        op.Expand(op.Unsqueeze(entry, op.Constant(value_ints=[1, 2])), rows),
        op.Expand(op.Unsqueeze(head, unit), rows),
        op.Expand(op.Unsqueeze(slot, op.Constant(value_ints=[1, 2])), rows),
        axis=2,
    )
    added = op.Reshape(new, op.Concat(axis0, heads, op.Constant(value_ints=[-1]), axis=0))
    return op.ScatterND(ring, places, added)


@script(EDIFICE, default_opset=op)
def FrameScores(query, keys, past_key, position):
    """Scores of one scaled query [batch, width]: [batch, heads, 1, window], -inf for slots that nothing is in yet. Keys
    are multiplied by a column, so that they need not be turned; what hides slots is the same for every layer.
    """
    heads = op.Shape(past_key, start=1, end=2)
    kept = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    unit = op.Constant(value_ints=[1])
    scores = op.MatMul(keys, op.Reshape(query, op.Concat(kept, heads, rest, unit, axis=0)))
    window = op.Squeeze(op.Shape(past_key, start=2, end=3), kept)
    slots = op.Range(op.Constant(value_int=0), window, op.Constant(value_int=1))
    filled = op.LessOrEqual(slots, op.Unsqueeze(position, op.Constant(value_ints=[1, 2, 3])))
    seen = op.CastLike(op.Constant(value_float=0.0), query)
    hidden = op.CastLike(op.Constant(value_float=float("-inf")), query)
    return op.Reshape(scores, op.Concat(kept, heads, unit, rest, axis=0)) + op.Where(filled, seen, hidden)


@script(EDIFICE, default_opset=op)
def SlidingAttentionFrame(query, key, value, past_key, past_value, position, num_heads: int, epsilon: float):
    """One query against the rings, its own frame among them."""
    final_key = IntoSlot(past_key, key, position)
    final_value = IntoSlot(past_value, value, position)
    scale = op.Sqrt(op.CastLike(op.Shape(past_key, start=3, end=4), query))
    scores = FrameScores(query / scale, final_key, past_key, position)
    y = op.Reshape(op.MatMul(op.Softmax(scores, axis=-1), final_value), op.Constant(value_ints=[0, -1]))
    return y, final_key, final_value


@script(EDIFICE, default_opset=op)
def SlidingAttentionSinksFrame(
    query, key, value, past_key, past_value, position, sink_key, sink_value, num_heads: int, epsilon: float
):
    """SlidingAttentionFrame with sinks beside the rings."""
    final_key = IntoSlot(past_key, key, position)
    final_value = IntoSlot(past_value, value, position)
    kept = op.Constant(value_ints=[0])
    heads = op.Shape(past_key, start=1, end=2)
    scale = op.Sqrt(op.CastLike(op.Shape(past_key, start=3, end=4), query))
    scaled = query / scale
    scores = FrameScores(scaled, final_key, past_key, position)
    row = op.Reshape(scaled, op.Concat(kept, heads, op.Constant(value_ints=[1, -1]), axis=0))
    split = op.Concat(kept, heads, op.Constant(value_ints=[-1]), axis=0)
    sink_scores = op.MatMul(row, op.Transpose(op.Reshape(sink_key, split), perm=[1, 2, 0]))
    weights = op.Softmax(op.Concat(sink_scores, scores, axis=-1), axis=-1)
    ends = op.Concat(op.Shape(sink_key, start=0, end=1), op.Shape(past_key, start=2, end=3), axis=0)
    sink_weights, frame_weights = op.Split(weights, ends, axis=-1)
    from_sinks = op.MatMul(sink_weights, op.Transpose(op.Reshape(sink_value, split), perm=[1, 0, 2]))
    y = op.Reshape(from_sinks + op.MatMul(frame_weights, final_value), op.Constant(value_ints=[0, -1]))
    return y, final_key, final_value


register(
    sliding_attention,
    (
        Lowering("blocks", SlidingAttention),
        Lowering("blocks", SlidingAttentionSinks),
        Lowering("frame", SlidingAttentionFrame, is_frame=True),
        Lowering("frame", SlidingAttentionSinksFrame, is_frame=True),
    ),
)
