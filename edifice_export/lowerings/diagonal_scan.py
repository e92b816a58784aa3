"""edifice::DiagonalScan, see edifice_reference.ops.diagonal_scan.

The decays are constant and shared by all channels, so that the scan is a matrix of weights between frames times the
frames: weight[t, s] = sum_n c_t[n] * b_s[n] * exp(log_decay[n] * (t - s)). No power of a decay is ever divided by
another: exponents are products of a log decay and a number of frames that is not negative.
"""

from onnxscript import script

from edifice_reference.ops import diagonal_scan

from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def DecayedWeights(log_decay, b, c):
    """The weights between the frames of a sequence whose length is a multiple of 8, of those after a frame none.

    Frames are taken in blocks of 8. Between frames of two blocks the decay is a product of three: to the end of the
    block of s, over the blocks between, and from the start of the block of t; so it is a product of matrices. Within a
    block it is taken for each pair of frames.

    Args:
        log_decay: [groups, state].
        b: [sequences, length, groups, state].
        c: [sequences, length, groups, state].

    Returns:
        [sequences, groups, length, length].
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    size = op.Constant(value_int=8)
    blocks = op.Squeeze(op.Shape(b, start=1, end=2), op.Constant(value_ints=[0])) / size
    in_blocks = op.Concat(op.Constant(value_ints=[0, -1, 8]), op.Shape(b, start=2, end=4), axis=0)
    keys = op.Transpose(op.Reshape(b, in_blocks), perm=[0, 3, 1, 2, 4])
    queries = op.Transpose(op.Reshape(c, in_blocks), perm=[0, 3, 1, 2, 4])

    # [groups, 1, frames, state], and so on: log decays have their axes in front and behind.
    frames = op.Range(zero, size, one)
    frame = op.CastLike(op.Unsqueeze(frames, op.Constant(value_ints=[1])), b)
    rates = op.Unsqueeze(log_decay, op.Constant(value_ints=[1, 2]))
    since_start = op.Exp(rates * frame)
    to_end = op.Exp(rates * (op.CastLike(op.Constant(value_float=7.0), b) - frame))

    block = op.Range(zero, blocks, one)
    between = op.Unsqueeze(block, op.Constant(value_ints=[1])) - block - one
    passed = op.CastLike(op.Relu(op.CastLike(between * size + one, b)), b)
    before = op.CastLike(op.GreaterOrEqual(between, zero), b)
    axes = op.Constant(value_ints=[2, 3])
    over_blocks = op.Exp(op.Unsqueeze(rates, op.Constant(value_ints=[3])) * op.Unsqueeze(passed, axes))
    over_blocks = over_blocks * op.Unsqueeze(before, axes)
    aged = op.Unsqueeze(keys * to_end, op.Constant(value_ints=[2])) * over_blocks
    flat = op.Concat(op.Constant(value_ints=[0, 0, 0, -1]), op.Shape(b, start=3, end=4), axis=0)
    seen = op.Transpose(op.Reshape(aged, flat), perm=[0, 1, 2, 4, 3])
    from_blocks = op.MatMul(queries * since_start, seen)

    age = op.Unsqueeze(frames, op.Constant(value_ints=[1])) - frames
    within = op.CastLike(op.GreaterOrEqual(age, zero), b)
    waited = op.CastLike(op.Relu(op.CastLike(age, b)), b)
    last = op.Constant(value_ints=[2])
    faded = op.Exp(op.Unsqueeze(rates, op.Constant(value_ints=[1])) * op.Unsqueeze(waited, last))
    faded = faded * op.Unsqueeze(within, last)
    pairs = op.Unsqueeze(keys, op.Constant(value_ints=[3])) * faded
    own = op.MatMul(pairs, op.Unsqueeze(queries, op.Constant(value_ints=[5])))
    diagonal = op.CastLike(op.Equal(op.Unsqueeze(block, op.Constant(value_ints=[1])), block), b)
    placed = op.Transpose(own, perm=[0, 1, 2, 3, 5, 4]) * op.Unsqueeze(diagonal, op.Constant(value_ints=[1, 3]))

    lengths = op.Concat(
        op.Constant(value_ints=[0, 0]), op.Shape(b, start=1, end=2), op.Shape(b, start=1, end=2), axis=0
    )
    return op.Reshape(from_blocks, lengths) + op.Reshape(placed, lengths)


@script(EDIFICE, default_opset=op)
def StateAfter(x, log_decay, b):
    """What frames leave in the state: [batch, groups, state, channels]."""
    zero = op.Constant(value_int=0)
    length = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    after = length - op.Constant(value_int=1) - op.Range(zero, length, op.Constant(value_int=1))
    left = op.Exp(op.Unsqueeze(op.CastLike(after, x), op.Constant(value_ints=[1, 2])) * log_decay)
    return op.MatMul(op.Transpose(b * left, perm=[0, 2, 3, 1]), op.Unsqueeze(x, op.Constant(value_ints=[1])))


@script(EDIFICE, default_opset=op)
def ReadOfPast(x, log_decay, c, initial):
    """What an initial state adds to the read-outs of the last frames: [batch, queries, groups, channels]."""
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    length = op.Squeeze(op.Shape(x, start=1, end=2), axis0)
    queries = op.Squeeze(op.Shape(c, start=1, end=2), axis0)
    frames = op.CastLike(op.Range(length - queries + one, length + one, one), x)
    left = op.Exp(op.Unsqueeze(frames, op.Constant(value_ints=[1, 2])) * log_decay)
    return op.Transpose(op.MatMul(op.Transpose(c * left, perm=[0, 2, 1, 3]), initial), perm=[0, 2, 1, 3])


@script(EDIFICE, default_opset=op)
def LeftOfPast(x, log_decay, initial):
    """What is left of an initial state after all frames."""
    length = op.CastLike(op.Shape(x, start=1, end=2), x)
    return op.Unsqueeze(op.Exp(length * log_decay), op.Constant(value_ints=[2])) * initial


@script(EDIFICE, default_opset=op)
def ReadMasked(x, log_decay, b, c):
    """The weights between all frames, times the frames."""
    zero = op.Constant(value_ints=[0])
    eight = op.Constant(value_ints=[8])
    length = op.Shape(x, start=1, end=2)
    missing = (eight - length % eight) % eight
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), missing, zero, zero, axis=0)
    weights = DecayedWeights(log_decay, op.Pad(b, pads), op.Pad(c, pads))
    both = op.Concat(length, length, axis=0)
    weights = op.Slice(weights, op.Constant(value_ints=[0, 0]), both, op.Constant(value_ints=[2, 3]))
    return op.Transpose(op.MatMul(weights, op.Unsqueeze(x, op.Constant(value_ints=[1]))), perm=[0, 2, 1, 3])


@script(EDIFICE, default_opset=op)
def ReadChunked(x, log_decay, b, c, initial):
    """Chunks of 64 frames: the weights within each, and the states between them, which are matrix products as well.

    Time and memory grow as the length does, but for a product of chunks by chunks that is small up to 8,192 frames.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    size = op.Constant(value_ints=[64])
    length = op.Shape(x, start=1, end=2)
    missing = (size - length % size) % size
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), missing, zero, zero, axis=0)
    groups = op.Shape(b, start=2, end=4)
    each = op.Concat(op.Constant(value_ints=[-1, 64]), groups, axis=0)
    b_in = op.Reshape(op.Pad(b, pads), each)
    c_in = op.Reshape(op.Pad(c, pads), each)
    x_pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, zero, axis=0)
    x_in = op.Reshape(
        op.Pad(x, x_pads), op.Concat(op.Constant(value_ints=[-1, 64]), op.Shape(x, start=2, end=3), axis=0)
    )
    weights = DecayedWeights(log_decay, b_in, c_in)
    within = op.MatMul(weights, op.Unsqueeze(x_in, one))

    # Of each chunk, what it leaves: [batch, groups, state, chunks, channels].
    left = StateAfter(x_in, log_decay, b_in)
    by_batch = op.Concat(
        op.Shape(x, start=0, end=1), op.Constant(value_ints=[-1]), op.Shape(left, start=1, end=4), axis=0
    )
    left = op.Transpose(op.Reshape(left, by_batch), perm=[0, 2, 3, 1, 4])
    chunks = op.Squeeze(op.Shape(left, start=3, end=4), zero)
    chunk = op.Range(op.Constant(value_int=0), chunks, op.Constant(value_int=1))
    between = op.Unsqueeze(chunk, one) - chunk - op.Constant(value_int=1)
    passed = op.Relu(op.CastLike(between, x)) * op.CastLike(op.Constant(value_float=64.0), x)
    earlier = op.CastLike(op.GreaterOrEqual(between, op.Constant(value_int=0)), x)
    rates = op.Unsqueeze(log_decay, op.Constant(value_ints=[2, 3]))
    start = op.MatMul(op.Exp(rates * passed) * earlier, left)
    frames_before = op.CastLike(chunk * op.Constant(value_int=64), x)
    kept = op.Exp(rates * op.Unsqueeze(frames_before, one))
    start = start + kept * op.Unsqueeze(initial, op.Constant(value_ints=[3]))

    # Back to [sequences, groups, state, channels], to be read out within each chunk.
    start = op.Transpose(start, perm=[0, 3, 1, 2, 4])
    start = op.Reshape(start, op.Concat(op.Constant(value_ints=[-1]), op.Shape(start, start=2, end=5), axis=0))
    frames = op.CastLike(op.Range(op.Constant(value_int=1), op.Constant(value_int=65), op.Constant(value_int=1)), x)
    since = op.Exp(op.Unsqueeze(frames, op.Constant(value_ints=[1, 2])) * log_decay)
    from_before = op.MatMul(op.Transpose(c_in * since, perm=[0, 2, 1, 3]), start)
    y = op.Transpose(within + from_before, perm=[0, 2, 1, 3])
    whole = op.Concat(op.Shape(x, start=0, end=1), op.Constant(value_ints=[-1]), op.Shape(y, start=2, end=4), axis=0)
    return op.Slice(op.Reshape(y, whole), zero, length, one)


@script(EDIFICE, default_opset=op)
def NoState(log_decay, x):
    """Zeros [1, groups, state, channels]."""
    shape = op.Concat(op.Constant(value_ints=[1]), op.Shape(log_decay), op.Shape(x, start=2, end=3), axis=0)
    return op.CastLike(op.ConstantOfShape(shape), x)


@script(EDIFICE, default_opset=op)
def ReadDirect(x, log_decay, b, c):
    """The weights of all frames for the last read-outs, each for itself, times the frames."""
    one = op.Constant(value_int=1)
    zero = op.Constant(value_int=0)
    axis0 = op.Constant(value_ints=[0])
    length = op.Squeeze(op.Shape(x, start=1, end=2), axis0)
    queries = op.Squeeze(op.Shape(c, start=1, end=2), axis0)
    read_at = op.Range(length - queries, length, one)
    age = op.Unsqueeze(read_at, op.Constant(value_ints=[1])) - op.Range(zero, length, one)
    seen = op.CastLike(op.GreaterOrEqual(age, zero), x)
    waited = op.Relu(op.CastLike(age, x))
    last = op.Constant(value_ints=[2])
    faded = op.Exp(op.Unsqueeze(log_decay, op.Constant(value_ints=[1, 2])) * op.Unsqueeze(waited, last))
    faded = faded * op.Unsqueeze(seen, last)
    keys = op.Unsqueeze(op.Transpose(b, perm=[0, 2, 1, 3]), last) * faded
    weights = op.MatMul(keys, op.Unsqueeze(op.Transpose(c, perm=[0, 2, 1, 3]), op.Constant(value_ints=[4])))
    weights = op.Squeeze(weights, op.Constant(value_ints=[4]))
    return op.Transpose(op.MatMul(weights, op.Unsqueeze(x, op.Constant(value_ints=[1]))), perm=[0, 2, 1, 3])


@script(EDIFICE, default_opset=op)
def DiagonalScanMasked(x, log_decay, b, c):
    """For sequences of a few hundred frames: time grows as the square."""
    return ReadMasked(x, log_decay, b, c), StateAfter(x, log_decay, b)


@script(EDIFICE, default_opset=op)
def DiagonalScanMaskedFrom(x, log_decay, b, c, initial):
    """The same from an initial state."""
    y = ReadMasked(x, log_decay, b, c) + ReadOfPast(x, log_decay, c, initial)
    return y, StateAfter(x, log_decay, b) + LeftOfPast(x, log_decay, initial)


@script(EDIFICE, default_opset=op)
def DiagonalScanDirect(x, log_decay, b, c):
    """For a few read-outs."""
    return ReadDirect(x, log_decay, b, c), StateAfter(x, log_decay, b)


@script(EDIFICE, default_opset=op)
def DiagonalScanDirectFrom(x, log_decay, b, c, initial):
    """The same from an initial state."""
    y = ReadDirect(x, log_decay, b, c) + ReadOfPast(x, log_decay, c, initial)
    return y, StateAfter(x, log_decay, b) + LeftOfPast(x, log_decay, initial)


@script(EDIFICE, default_opset=op)
def DiagonalScanChunked(x, log_decay, b, c, initial):
    """For longer ones: time grows as the length does."""
    y = ReadChunked(x, log_decay, b, c, initial)
    return y, StateAfter(x, log_decay, b) + LeftOfPast(x, log_decay, initial)


@script(EDIFICE, default_opset=op)
def DiagonalScanEither(x, log_decay, b, c):
    """Masked for up to 128 frames and chunked for more: a graph for a short window may be given long sequences."""
    frames = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    if op.LessOrEqual(frames, op.Constant(value_int=128)):
        y = ReadMasked(x, log_decay, b, c)
    else:
        y = ReadChunked(x, log_decay, b, c, NoState(log_decay, x))
    return y, StateAfter(x, log_decay, b)


@script(EDIFICE, default_opset=op)
def DiagonalScanFrame(x, log_decay, b, c, initial):
    """The step alone: h + ((exp(z) - 1) * h + x), see LinearScan."""
    half = op.CastLike(op.Constant(value_float=0.5), x)
    z = op.Unsqueeze(log_decay, op.Constant(value_ints=[2]))
    t = op.Tanh(z * half)
    change = t + t * op.Exp(z)
    added = op.Unsqueeze(b, op.Constant(value_ints=[3])) * op.Unsqueeze(x, op.Constant(value_ints=[1, 2]))
    final = initial + (change * initial + added)
    y = op.Squeeze(op.MatMul(op.Unsqueeze(c, op.Constant(value_ints=[2])), final), op.Constant(value_ints=[2]))
    return y, final


FEW, MASKED = 8, 128
"""Crossovers on a CPU, one thread, MASKED in DiagonalScanEither too: see `python benchmarks/ops.py diagonal_scan`."""


def _reads_all(call: Call) -> bool:
    """Whether there is a read-out of every frame."""
    x, c = call.shapes[0], call.shapes[3]
    return x is not None and c is not None and x[1] == c[1]


def _prefer(call: Call) -> tuple[str, str]:
    """By the number of read-outs and of frames."""
    queries, length = call.size(3, 1), call.size(0, 1)
    if not _reads_all(call) or (queries is not None and queries <= FEW):
        return "direct", f"{queries} read-outs"
    if length is not None and length <= MASKED:
        without_past = len(call.shapes) == 4 and call.scans
        return ("either" if without_past else "masked"), f"{length} frames, at most {MASKED}"
    return "chunked", "any number of frames" if length is None else f"{length} frames, more than {MASKED}"


register(
    diagonal_scan,
    (
        Lowering("masked", DiagonalScanMasked, takes=_reads_all),
        Lowering("masked", DiagonalScanMaskedFrom, takes=_reads_all),
        Lowering("either", DiagonalScanEither, takes=_reads_all),
        Lowering("chunked", DiagonalScanChunked, takes=_reads_all),
        Lowering("direct", DiagonalScanDirect),
        Lowering("direct", DiagonalScanDirectFrom),
        Lowering("frame", DiagonalScanFrame, is_frame=True),
    ),
    _prefer,
)
