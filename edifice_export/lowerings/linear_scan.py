"""edifice::LinearScan, see edifice_reference.ops.linear_scan.

A decay that all channels share makes the scan a matrix of weights between frames times the frames: weight[t, s] is the
exponential of the sum of log decays after s up to t. These sums are made for each pair of frames: a difference of two
sums from the start would lose what little is left of small ones.
"""

from onnxscript import script

from edifice_reference.ops import linear_scan

from .blocked_scan import BlockedScan
from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def SegmentDecays(log_decay):
    """From log decays [sequences, length, 1] what is left of frame s at frame t [sequences, length, length]."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis1 = op.Constant(value_ints=[1])
    length = op.Squeeze(op.Shape(log_decay, start=1, end=2), op.Constant(value_ints=[0]))
    frames = op.Range(zero, length, one)
    column = op.Unsqueeze(frames, axis1)
    nothing = op.CastLike(op.Constant(value_float=0.0), log_decay)
    gone = op.CastLike(op.Constant(value_float=float("-inf")), log_decay)
    after = op.Where(op.Less(frames, column), log_decay, nothing)
    sums = op.CumSum(after, one)
    return op.Exp(op.Where(op.LessOrEqual(frames, column), sums, gone))


@script(EDIFICE, default_opset=op)
def AllMasked(x, log_decay, initial):
    """h at every frame by the weights between all of them: time and memory grow as the square of the length."""
    one = op.Constant(value_int=1)
    kept = op.Exp(op.CumSum(log_decay, one)) * op.Unsqueeze(initial, op.Constant(value_ints=[1]))
    return op.MatMul(SegmentDecays(log_decay), x) + kept


@script(EDIFICE, default_opset=op)
def AllChunked(x, log_decay, initial):
    """Chunks of 64 frames: the weights within each, and those between what the chunks leave."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    size = op.Constant(value_ints=[64])
    axis1 = op.Constant(value_int=1)
    length = op.Shape(x, start=1, end=2)
    batch = op.Shape(x, start=0, end=1)
    channels = op.Shape(x, start=2, end=3)
    missing = (size - length % size) % size
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, zero, axis=0)
    decays = op.Reshape(op.Pad(log_decay, pads), op.Constant(value_ints=[-1, 64, 1]))
    frames = op.Reshape(op.Pad(x, pads), op.Concat(op.Constant(value_ints=[-1, 64]), channels, axis=0))
    within = op.MatMul(SegmentDecays(decays), frames)

    sums = op.CumSum(decays, axis1)
    by_batch = op.Concat(batch, op.Constant(value_ints=[-1]), op.Constant(value_ints=[1]), axis=0)
    chunk_decays = op.Reshape(op.Gather(sums, op.Constant(value_int=-1), axis=1), by_batch)
    chunks = op.Concat(batch, op.Constant(value_ints=[-1]), channels, axis=0)
    left = op.Reshape(op.Gather(within, op.Constant(value_int=-1), axis=1), chunks)
    first = op.Expand(op.Unsqueeze(initial, one), op.Concat(batch, one, channels, axis=0))
    # What each chunk starts from: the initial state, and what is left of it and of the chunks before.
    kept = op.Exp(op.CumSum(chunk_decays, axis1)) * first
    after = op.MatMul(SegmentDecays(chunk_decays), left) + kept
    before = op.Slice(op.Concat(first, after, axis=1), zero, op.Constant(value_ints=[-1]), one)
    before = op.Reshape(before, op.Concat(op.Constant(value_ints=[-1, 1]), channels, axis=0))
    y = op.Reshape(within + op.Exp(sums) * before, chunks)
    return op.Slice(y, zero, length, one)


@script(EDIFICE, default_opset=op)
def LinearScanMasked(x, log_decay):
    """The weights between all frames, times the frames, from a state of zeros."""
    y = op.MatMul(SegmentDecays(log_decay), x)
    final = op.Gather(y, op.Constant(value_int=-1), axis=1)
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanMaskedFrom(x, log_decay, initial):
    """The same from an initial state."""
    y = AllMasked(x, log_decay, initial)
    final = op.Gather(y, op.Constant(value_int=-1), axis=1)
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanChunked(x, log_decay, initial):
    """Chunks of 64 frames: time and memory grow as the length does."""
    y = AllChunked(x, log_decay, initial)
    final = op.Gather(y, op.Constant(value_int=-1), axis=1)
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanEither(x, log_decay, initial):
    """Masked for up to 96 frames and chunked for more: a graph for a short window may be given long sequences."""
    frames = op.Squeeze(op.Shape(x, start=1, end=2), op.Constant(value_ints=[0]))
    if op.LessOrEqual(frames, op.Constant(value_int=96)):
        y = AllMasked(x, log_decay, initial)
    else:
        y = AllChunked(x, log_decay, initial)
    final = op.Gather(y, op.Constant(value_int=-1), axis=1)
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanBlocked(x, log_decay, initial):
    """Decays of each channel's own, in blocks: no product of matrices, and no loop over time."""
    decay = op.Exp(op.Expand(log_decay, op.Shape(x)))
    y = BlockedScan(decay, x, initial)
    final = op.Gather(y, op.Constant(value_int=-1), axis=1)
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanFrame(x, log_decay, initial):
    """The step alone: h + ((exp(z) - 1) * h + x), as what is left of a frame after thousands depends on 1 - exp(z),
    which exp alone rounds away. exp(z) - 1 is t + t * exp(z) with t = tanh(z / 2), exact to rounding for every z. Where
    little is left of h after one frame, it is exp(z) * h + x in the plain form.
    """
    half = op.CastLike(op.Constant(value_float=0.5), x)
    t = op.Tanh(log_decay * half)
    decay = op.Exp(log_decay)
    slow = op.Greater(decay, half)
    kept = op.CastLike(slow, x)
    change = op.Where(slow, t + t * decay, decay)
    final = kept * initial + (change * initial + x)
    y = op.Identity(final)
    return y, final


MASKED = 96
"""Crossover on a CPU, one thread, in LinearScanEither too: see `python benchmarks/ops.py linear_scan`."""


def _shares_its_decay(call: Call) -> bool:
    decay = call.shapes[1]
    return decay is not None and decay[-1] == 1


def _has_its_own_decays(call: Call) -> bool:
    return not _shares_its_decay(call)


def _prefer(call: Call) -> tuple[str, str]:
    length = call.size(0, 1)
    if length is not None and length <= MASKED:
        return ("either" if call.scans else "masked"), f"{length} frames, at most {MASKED}"
    return "chunked", "any number of frames" if length is None else f"{length} frames, more than {MASKED}"


register(
    linear_scan,
    (
        Lowering("masked", LinearScanMasked, takes=_shares_its_decay),
        Lowering("masked", LinearScanMaskedFrom, takes=_shares_its_decay),
        Lowering("either", LinearScanEither, takes=_shares_its_decay),
        Lowering("chunked", LinearScanChunked, takes=_shares_its_decay),
        Lowering("blocked", LinearScanBlocked, takes=_has_its_own_decays),
        Lowering("frame", LinearScanFrame, is_frame=True),
    ),
    _prefer,
)
