"""What recurrences of a matrix state share: chunks of frames, in which everything is a product of matrices.

Sequences are [batch, sequence, heads, width]; in chunks [batch, heads, chunks, frames, width]. What is left of frame s
at frame t is the exponential of the sum of log decays after s up to t: every such sum is made for itself, of numbers
that are not positive. A difference of two sums from the start would lose what little is left of small ones, and a
quotient of products overflow.
"""

from onnxscript import script

from .domain import EDIFICE, op
from .lowering import Call

__all__ = ["BetweenFrames", "FromChunks", "InChunks", "ScoresByHead", "ScoresByKey", "SplitDecay", "by_head"]


def by_head(call: Call) -> bool:
    """Whether log_decay, the fourth of what such an op takes, is one number for each head."""
    decay = call.shapes[3]
    return decay is not None and decay[-1] == 1


@script(EDIFICE, default_opset=op)
def InChunks(x, size: int):
    """Chunks of so many frames, the last one filled up with zeros; a shorter sequence is one chunk of its length."""
    zeros = op.Constant(value_ints=[0, 0, 0, 0, 0])
    length = op.Shape(x, start=1, end=2)
    frames = op.Min(length, op.Reshape(op.Constant(value_int=size), op.Constant(value_ints=[1])))
    missing = (frames - length % frames) % frames
    filled = op.Pad(x, op.Concat(zeros, missing, op.Constant(value_ints=[0, 0]), axis=0))
    shape = op.Concat(op.Constant(value_ints=[0, -1]), frames, op.Shape(x, start=2, end=4), axis=0)
    return op.Transpose(op.Reshape(filled, shape), perm=[0, 3, 1, 2, 4])


@script(EDIFICE, default_opset=op)
def FromChunks(chunks, like):
    """InChunks undone, of as many frames as there are in another sequence."""
    shape = op.Concat(
        op.Constant(value_ints=[0, -1]), op.Shape(like, start=2, end=3), op.Shape(chunks, start=4), axis=0
    )
    frames = op.Reshape(op.Transpose(chunks, perm=[0, 2, 3, 1, 4]), shape)
    one = op.Constant(value_ints=[1])
    return op.Slice(frames, op.Constant(value_ints=[0]), op.Shape(like, start=1, end=2), one)


@script(EDIFICE, default_opset=op)
def BetweenFrames(log_decay):
    """Of log decays [..., frames, 1] what is left of frame s at frame t [..., frames, frames]; none of later ones."""
    length = op.Squeeze(op.Shape(log_decay, start=-2, end=-1), op.Constant(value_ints=[0]))
    frames = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    column = op.Unsqueeze(frames, op.Constant(value_ints=[1]))
    nothing = op.CastLike(op.Constant(value_float=0.0), log_decay)
    gone = op.CastLike(op.Constant(value_float=float("-inf")), log_decay)
    sums = op.CumSum(op.Where(op.Less(frames, column), log_decay, nothing), op.Constant(value_int=-2))
    return op.Exp(op.Where(op.LessOrEqual(frames, column), sums, gone))


@script(EDIFICE, default_opset=op)
def ScoresByHead(query, key, log_decay):
    """The weight of frame s in frame t of a chunk, with a decay for each head."""
    return op.MatMul(query, op.Transpose(key, perm=[0, 1, 2, 4, 3])) * BetweenFrames(log_decay)


@script(EDIFICE, default_opset=op)
def ScoresByKey(query, key, log_decay):
    """The same with a decay for each channel of a key, each pair by itself."""
    pairs = op.Unsqueeze(op.Transpose(log_decay, perm=[0, 1, 2, 4, 3]), op.Constant(value_ints=[5]))
    left = op.Transpose(BetweenFrames(pairs), perm=[0, 1, 2, 4, 3, 5])
    keys = op.Unsqueeze(op.Transpose(key, perm=[0, 1, 2, 4, 3]), op.Constant(value_ints=[3]))
    row = op.Constant(value_ints=[4])
    return op.Squeeze(op.MatMul(op.Unsqueeze(query, row), left * keys), row)


@script(EDIFICE, default_opset=op)
def SplitDecay(log_decay):
    """A decay as 1 or 0 and a change of that: h is then kept * h + (change * h + x), see LinearScanFrame."""
    half = op.CastLike(op.Constant(value_float=0.5), log_decay)
    t = op.Tanh(log_decay * half)
    decay = op.Exp(log_decay)
    slow = op.Greater(decay, half)
    return op.CastLike(slow, log_decay), op.Where(slow, t + t * decay, decay)
