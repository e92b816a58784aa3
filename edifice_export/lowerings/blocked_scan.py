"""A recurrence h_t = a_t * h_{t-1} + u_t in blocks, all at once: for targets without Scan, and for NPUs."""

from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["BlockedScan"]


@script(EDIFICE, default_opset=op)
def WithinBlocks(a, u):
    """Of blocks [blocks, 16, channels], each from a state of zeros: h at every frame, and what is left of the state
    before the block.

    Sixteen steps, in all blocks at once. Eight pieces at a time: WebGPU has ten buffers for an operator.
    """
    a_left, a_right = op.Split(a, num_outputs=2, axis=1)
    u_left, u_right = op.Split(u, num_outputs=2, axis=1)
    a0, a1, a2, a3, a4, a5, a6, a7 = op.Split(a_left, num_outputs=8, axis=1)
    a8, a9, a10, a11, a12, a13, a14, a15 = op.Split(a_right, num_outputs=8, axis=1)
    u0, u1, u2, u3, u4, u5, u6, u7 = op.Split(u_left, num_outputs=8, axis=1)
    u8, u9, u10, u11, u12, u13, u14, u15 = op.Split(u_right, num_outputs=8, axis=1)
    h1 = a1 * u0 + u1
    h2 = a2 * h1 + u2
    h3 = a3 * h2 + u3
    h4 = a4 * h3 + u4
    h5 = a5 * h4 + u5
    h6 = a6 * h5 + u6
    h7 = a7 * h6 + u7
    h8 = a8 * h7 + u8
    h9 = a9 * h8 + u9
    h10 = a10 * h9 + u10
    h11 = a11 * h10 + u11
    h12 = a12 * h11 + u12
    h13 = a13 * h12 + u13
    h14 = a14 * h13 + u14
    h15 = a15 * h14 + u15
    p1 = a1 * a0
    p2 = a2 * p1
    p3 = a3 * p2
    p4 = a4 * p3
    p5 = a5 * p4
    p6 = a6 * p5
    p7 = a7 * p6
    p8 = a8 * p7
    p9 = a9 * p8
    p10 = a10 * p9
    p11 = a11 * p10
    p12 = a12 * p11
    p13 = a13 * p12
    p14 = a14 * p13
    p15 = a15 * p14
    h = op.Concat(
        op.Concat(u0, h1, h2, h3, h4, h5, h6, h7, axis=1),
        op.Concat(h8, h9, h10, h11, h12, h13, h14, h15, axis=1),
        axis=1,
    )
    left = op.Concat(
        op.Concat(a0, p1, p2, p3, p4, p5, p6, p7, axis=1),
        op.Concat(p8, p9, p10, p11, p12, p13, p14, p15, axis=1),
        axis=1,
    )
    return h, left


@script(EDIFICE, default_opset=op)
def InBlocksOf16(a, u):
    """[batch, length, channels] -> [batch * blocks, 16, channels], the last block filled up."""
    zero = op.Constant(value_ints=[0])
    size = op.Constant(value_ints=[16])
    length = op.Shape(a, start=1, end=2)
    missing = (size - length % size) % size
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, zero, axis=0)
    shape = op.Concat(op.Constant(value_ints=[-1, 16]), op.Shape(a, start=2, end=3), axis=0)
    return op.Reshape(op.Pad(a, pads), shape), op.Reshape(op.Pad(u, pads), shape)


@script(EDIFICE, default_opset=op)
def FromBlocks(h, left, before, like):
    """The frames [batch, length, channels] of blocks, from the state before each block [batch, blocks, channels]."""
    zero = op.Constant(value_ints=[0])
    each = op.Concat(op.Constant(value_ints=[-1, 1]), op.Shape(like, start=2, end=3), axis=0)
    whole = op.Concat(
        op.Shape(like, start=0, end=1), op.Constant(value_ints=[-1]), op.Shape(like, start=2, end=3), axis=0
    )
    frames = op.Reshape(h + left * op.Reshape(before, each), whole)
    return op.Slice(frames, zero, op.Shape(like, start=1, end=2), op.Constant(value_ints=[1]))


@script(EDIFICE, default_opset=op)
def LastOfBlocks(values, like):
    """The last frame of each block [batch, blocks, channels]."""
    whole = op.Concat(
        op.Shape(like, start=0, end=1), op.Constant(value_ints=[-1]), op.Shape(like, start=2, end=3), axis=0
    )
    return op.Reshape(op.Gather(values, op.Constant(value_int=-1), axis=1), whole)


@script(EDIFICE, default_opset=op)
def Before(initial, after):
    """From the states after each block those before each."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    shape = op.Concat(op.Shape(after, start=0, end=1), one, op.Shape(after, start=2, end=3), axis=0)
    first = op.Expand(op.Unsqueeze(initial, one), shape)
    return op.Slice(op.Concat(first, after, axis=1), zero, op.Constant(value_ints=[-1]), one)


@script(EDIFICE, default_opset=op)
def BlockedScan(a, u, initial):
    """h_t = a_t * h_{t-1} + u_t, of a and u [batch, sequence, channels] and an initial state [batch or 1, channels].

    Blocks of 16 frames, blocks of 16 blocks, and so on: what each leaves is a recurrence of a sixteenth of the length.
    Four levels are 65,536 frames; of a longer sequence a size is negative, which a runtime refuses.
    """
    a1, u1 = InBlocksOf16(a, u)
    h1, left1 = WithinBlocks(a1, u1)
    blocks_a = LastOfBlocks(left1, a)
    blocks_u = LastOfBlocks(h1, a)
    a2, u2 = InBlocksOf16(blocks_a, blocks_u)
    h2, left2 = WithinBlocks(a2, u2)
    higher_a = LastOfBlocks(left2, blocks_a)
    higher_u = LastOfBlocks(h2, blocks_a)
    a3, u3 = InBlocksOf16(higher_a, higher_u)
    h3, left3 = WithinBlocks(a3, u3)
    top_a = LastOfBlocks(left3, higher_a)
    top_u = LastOfBlocks(h3, higher_a)
    # The name is what a runtime's error says.
    longer_than_65536_frames = op.Constant(value_ints=[16]) - op.Shape(top_a, start=1, end=2)
    missing = op.ConstantOfShape(
        op.Concat(op.Shape(a, start=0, end=1), longer_than_65536_frames, op.Shape(a, start=2, end=3), axis=0)
    )
    filler = op.CastLike(missing, a)
    h4, left4 = WithinBlocks(op.Concat(top_a, filler, axis=1), op.Concat(top_u, filler, axis=1))
    top = h4 + left4 * op.Unsqueeze(initial, op.Constant(value_ints=[1]))
    top = op.Slice(top, op.Constant(value_ints=[0]), op.Shape(top_a, start=1, end=2), op.Constant(value_ints=[1]))
    higher = FromBlocks(h3, left3, Before(initial, top), higher_a)
    blocks = FromBlocks(h2, left2, Before(initial, higher), blocks_a)
    return FromBlocks(h1, left1, Before(initial, blocks), a)
