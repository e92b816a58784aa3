"""edifice::FftConv, see edifice_reference.ops.fft_conv.

Two Fourier transforms made of matrix products, and for short windows the sum itself.

A causal convolution of n frames is the lower half of a product of polynomials of 2n terms. With the frames weighted by
w^t, w^n = i, the upper half comes back multiplied by i: a cyclic convolution of n complex numbers has the lower half as
its real part (a right-angle convolution), so that nothing is filled up with zeros and the input stays real. That is a
transform at frequencies k + 1/4 for whole k: the roots are exp(-2 pi i t (4k + 1) / 4n).

The transform is taken apart as usual, t = n2 * t1 + t2 and k = k1 + n1 * k2, the factors between the stages inside the
later one's matrices. Each stage is one product, a matrix for each frequency found so far, whose rows are in the order
in which the next stage takes them: nothing is ever transposed.

The product with the kernel's spectrum (p + iq) takes three real ones, of re, im and re + im:

    re * (q - p),  im * (-p - q),  (re + im) * p

The last forward matrix makes these three, and the first one back takes them, so that between the two there is one
elementwise product. Matrices and spectrum depend on no input where the kernel is a constant: a runtime makes them once,
when it loads the model.
"""

import re

from onnxscript import script

from edifice_reference.ops import fft_conv

from .domain import EDIFICE, op
from .last_of_fft_conv import last_of_fft_conv
from .lowering import Call, Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def CosinesOf(steps, quarter):
    """cos(2 pi s / order) for every s from 0 to order, of which quarter is a fourth: float32, right to rounding.

    By a series below an eighth of a turn, and symmetry, which is exact in integers: what Cos gives on a GPU may have
    ten bits, the cosine of a large angle in float32 loses some, and browsers' WebGPU build has no double.
    """
    two = op.Constant(value_ints=[2])
    order = op.Constant(value_ints=[4]) * quarter
    turned = op.Min(steps, order - steps)
    is_negative = quarter < turned
    folded = op.Where(is_negative, two * quarter - turned, turned)
    is_sine = quarter < two * folded
    part = op.Where(is_sine, quarter - folded, folded)
    y = op.Cast(part, to=1) / op.Cast(order, to=1) * op.Constant(value_float=6.283185307179586)
    z = y * y
    cosine = op.Constant(value_float=1 / 40320) - z * op.Constant(value_float=1 / 3628800)
    cosine = op.Constant(value_float=-1 / 720) + z * cosine
    cosine = op.Constant(value_float=1 / 24) + z * cosine
    cosine = op.Constant(value_float=1.0) + z * (op.Constant(value_float=-0.5) + z * cosine)
    sine = op.Constant(value_float=-1 / 5040) + z * op.Constant(value_float=1 / 362880)
    sine = op.Constant(value_float=-1 / 6) + z * (op.Constant(value_float=1 / 120) + z * sine)
    sine = y + y * (z * sine)
    positive = op.Where(is_sine, sine, cosine)
    return op.Where(is_negative, op.Neg(positive), positive)


@script(EDIFICE, default_opset=op)
def Roots(found, radix, like):
    """What a stage multiplies by: exp(-2 pi i t (4k + 1 + 4 * before * q) / (4 * before * radix)), for each frequency k
    found so far, of which there are `before`, each new digit q and each frame t of the stage.

    Args:
        found: the frequencies, int64 [before].
        radix: of the stage, int64 [1].
        like: a tensor of the type to use.

    Returns:
        Real and imaginary parts [before, q, t].
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    four = op.Constant(value_ints=[4])
    quarter = op.Shape(found) * radix
    order = four * quarter
    steps = op.Range(zero, op.Squeeze(order, axis0), one)
    cosine = op.CastLike(CosinesOf(steps, quarter), like)
    # One turn is order entries, and no index reaches three.
    table = op.Concat(cosine, cosine, cosine, axis=0)
    digits = op.Range(zero, op.Squeeze(radix, axis0), one)
    apart = op.Mod(op.Unsqueeze(digits, axis1) * digits, radix) * (four * op.Shape(found))
    shift = op.Unsqueeze(four * found + op.Constant(value_ints=[1]), axis1) * digits
    index = op.Unsqueeze(shift, axis1) + apart
    # -sin(a) = cos(a + a quarter turn)
    return op.Gather(table, index), op.Gather(table, index + quarter)


@script(EDIFICE, default_opset=op)
def ComplexRows(found, radix, like):
    """From parts of t, all real ones first, to the real and to the imaginary parts of q: two of [before, q, 2 * t]."""
    real, imaginary = Roots(found, radix, like)
    re = op.Concat(real, op.Neg(imaginary), axis=2)
    im = op.Concat(imaginary, real, axis=2)
    return re, im


@script(EDIFICE, default_opset=op)
def FirstStage(radix, like):
    """From real frames: [2 * q, t], the parts of each q one after the other. Its transpose goes back to real frames."""
    axis = op.Constant(value_ints=[2])
    real, imaginary = Roots(op.Constant(value_ints=[0]), radix, like)
    both = op.Concat(op.Unsqueeze(real, axis), op.Unsqueeze(imaginary, axis), axis=2)
    return op.Reshape(both, op.Concat(op.Constant(value_ints=[-1]), radix, axis=0))


@script(EDIFICE, default_opset=op)
def MiddleStage(found, radix, like):
    """Complex to complex: [before, 2 * q, 2 * t], the parts of each q one after the other. Its transpose goes back."""
    axis = op.Constant(value_ints=[2])
    re, im = ComplexRows(found, radix, like)
    both = op.Concat(op.Unsqueeze(re, axis), op.Unsqueeze(im, axis), axis=2)
    return op.Reshape(both, op.Concat(op.Shape(found), op.Constant(value_ints=[-1]), radix + radix, axis=0))


@script(EDIFICE, default_opset=op)
def LastStage(found, radix, like):
    """To re, im and re + im of the frequencies [before, 3 * q, 2 * t], and back from the products with the spectrum
    [before, 2 * t, 3 * q].
    """
    re, im = ComplexRows(found, radix, like)
    both = re + im
    back = op.Transpose(op.Concat(im, re, both, axis=1), perm=[0, 2, 1])
    return op.Concat(re, im, both, axis=1), back


@script(EDIFICE, default_opset=op)
def Factors(frequencies, size):
    """From re, im and re + im of a kernel's frequencies [1, before, 3 * q, channels] what a signal's are multiplied by;
    each way is a sum over size frequencies.
    """
    scaled = frequencies / op.CastLike(size, frequencies)
    p, q, both = op.Split(scaled, num_outputs=3, axis=2)
    return op.Concat(q - p, op.Neg(both), p, axis=2)


@script(EDIFICE, default_opset=op)
def FramesLeft(x, kernel):
    """How many more there could be in the window. The name is what a runtime's error says of a sequence that is longer:
    a size is then negative.
    """
    left = op.Shape(kernel, start=0, end=1) - op.Shape(x, start=1, end=2)
    sequence_longer_than_window = op.ConstantOfShape(left)
    return op.Shape(sequence_longer_than_window)


@script(EDIFICE, default_opset=op)
def Filled(x, missing):
    """Frames [batch, length, channels] with zeros behind them."""
    return op.Pad(x, op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, op.Constant(value_ints=[0]), axis=0))


@script(EDIFICE, default_opset=op)
def FftConvTwoStages(x, kernel):
    """Two stages, the second of about half the square root of the window: it costs three times as much as the first."""
    unit = op.Constant(value_ints=[1])
    any_batch = op.Constant(value_ints=[-1])
    window = op.Shape(kernel, start=0, end=1)
    channels = op.Shape(kernel, start=1, end=2)
    root = op.Sqrt(op.Cast(window, to=1))
    n2 = op.Max(op.Cast(op.Round(root * op.Constant(value_float=0.5)), to=7), unit)
    n1 = (window + n2 - unit) / n2
    size = n1 * n2

    first = FirstStage(n1, kernel)
    k1 = op.Range(op.Constant(value_int=0), op.Squeeze(n1, op.Constant(value_ints=[0])), op.Constant(value_int=1))
    last, last_back = LastStage(k1, n2, kernel)
    first_back = op.Transpose(first, perm=[1, 0])
    rows = op.Concat(any_batch, n1, n2 * channels, axis=0)
    columns = op.Concat(any_batch, n1, n2 + n2, channels, axis=0)
    back = op.Concat(any_batch, n1 + n1, n2 * channels, axis=0)

    taps = op.Reshape(Filled(op.Unsqueeze(kernel, op.Constant(value_ints=[0])), size - window), rows)
    factors = Factors(op.MatMul(last, op.Reshape(op.MatMul(first, taps), columns)), size)

    frames = op.Reshape(Filled(x, FramesLeft(x, kernel) + (size - window)), rows)
    frequencies = op.MatMul(last, op.Reshape(op.MatMul(first, frames), columns))
    product = op.MatMul(last_back, frequencies * factors)
    y = op.MatMul(first_back, op.Reshape(product, back))
    y = op.Reshape(y, op.Concat(any_batch, size, channels, axis=0))
    return op.Slice(y, op.Constant(value_ints=[0]), op.Shape(x, start=1, end=2), unit)


@script(EDIFICE, default_opset=op)
def FftConvThreeStages(x, kernel):
    """Three stages, each of about the cube root of the window."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    unit = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    any_batch = op.Constant(value_ints=[-1])
    window = op.Shape(kernel, start=0, end=1)
    channels = op.Shape(kernel, start=1, end=2)
    # Even, as matrix products are better at.
    root = op.Pow(op.Cast(window, to=1), op.Constant(value_float=0.3333333432674408))
    n3 = two * op.Max(op.Cast(op.Round(root * op.Constant(value_float=0.5)), to=7), unit)
    square = n3 * n3
    n1 = (window + square - unit) / square
    size = n1 * square

    first = FirstStage(n1, kernel)
    k1 = op.Range(zero, op.Squeeze(n1, axis0), one)
    middle = MiddleStage(k1, n3, kernel)
    k2 = op.Range(zero, op.Squeeze(n3, axis0), one) * n1
    last, last_back = LastStage(op.Reshape(op.Unsqueeze(k1, unit) + k2, op.Constant(value_ints=[-1])), n3, kernel)
    first_back = op.Transpose(first, perm=[1, 0])
    middle_back = op.Transpose(middle, perm=[0, 2, 1])
    rows = op.Concat(any_batch, n1, square * channels, axis=0)
    columns = op.Concat(any_batch, n1, n3 + n3, n3 * channels, axis=0)
    deep = op.Concat(any_batch, n1 * n3, n3 + n3, channels, axis=0)
    back = op.Concat(any_batch, n1 + n1, square * channels, axis=0)

    taps = op.Reshape(Filled(op.Unsqueeze(kernel, axis0), size - window), rows)
    taps_2 = op.MatMul(middle, op.Reshape(op.MatMul(first, taps), columns))
    factors = Factors(op.MatMul(last, op.Reshape(taps_2, deep)), size)

    frames = op.Reshape(Filled(x, FramesLeft(x, kernel) + (size - window)), rows)
    frames_2 = op.MatMul(middle, op.Reshape(op.MatMul(first, frames), columns))
    frequencies = op.MatMul(last, op.Reshape(frames_2, deep))
    product = op.MatMul(last_back, frequencies * factors)
    product_2 = op.MatMul(middle_back, op.Reshape(product, columns))
    y = op.MatMul(first_back, op.Reshape(product_2, back))
    y = op.Reshape(y, op.Concat(any_batch, size, channels, axis=0))
    return op.Slice(y, axis0, op.Shape(x, start=1, end=2), unit)


@script(EDIFICE, default_opset=op)
def FftConvTaps(x, kernel, channels: int):
    """The sum itself, as a convolution of each channel by itself in two dimensions, one of them of size 1: of such ones
    with constant weights ONNX Runtime's CPU takes 16 channels at once, and both transposes with it.
    """
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    before = FramesLeft(x, kernel) + op.Shape(x, start=1, end=2) - one
    pads = op.Concat(op.Constant(value_ints=[0]), before, op.Constant(value_ints=[0, 0, 0, 0]), axis=0)
    image = op.Transpose(op.Unsqueeze(op.Pad(x, pads), one), perm=[0, 3, 1, 2])
    end = op.Constant(value_ints=[-9223372036854775807])
    oldest_first = op.Slice(kernel, last, end, op.Constant(value_ints=[0]), last)
    weight = op.Unsqueeze(op.Transpose(oldest_first, perm=[1, 0]), op.Constant(value_ints=[1, 2]))
    # Attributes that equal the defaults are written out: some web builds fail without them.
    y = op.Conv(image, weight, group=channels, dilations=[1, 1], strides=[1, 1], pads=[0, 0, 0, 0])
    return op.Squeeze(op.Transpose(y, perm=[0, 2, 3, 1]), one)


TAPS, TWO_STAGES = 192, 256
"""Windows up to which each is about the fastest on a CPU, one thread: see `python benchmarks/ops.py fft_conv`."""

AT_ONCE = 16
"""Channels that ONNX Runtime's kernel for FftConvTaps takes at once. It is not used for numbers of channels that are no
multiple of it, and FftConvTaps is slow then.
"""


def _knows_its_channels(call: Call) -> bool:
    kernel = call.shapes[1]
    return kernel is not None and isinstance(kernel[1], int)


def _is_constant(call: Call) -> bool:
    return len(call.constants) > 1 and call.constants[1] is not None


def _least_window(call: Call) -> int | None:
    """Of a window that grows with the sequence, such as "sequence + 60", what it has at least."""
    kernel = call.shapes[1]
    grows = re.search(r"\+ (\d+)$", str(kernel[0])) if kernel is not None else None
    return int(grows[1]) if grows else None


def _prefer(call: Call) -> tuple[str, str]:
    window, channels = call.size(1, 0), call.size(1, 1)
    frames = f"a window of {window} frames"
    if window is None:
        window = _least_window(call)
        frames = "a window of any size" if window is None else f"a window of {window} frames or more"
    elif (
        window <= TAPS
        and _is_constant(call)
        and channels is not None
        and channels % AT_ONCE == 0
        and call.target in ("portable", "cpu")
    ):
        return "taps", f"{frames}, at most {TAPS}, and constant taps for {channels} channels"
    if window is not None and window <= TWO_STAGES:
        return "two_stages", f"{frames}, not above {TWO_STAGES}"
    return "three_stages", frames


register(
    fft_conv,
    (
        Lowering("taps", FftConvTaps, takes=_knows_its_channels, sizes={"channels": (1, 1)}),
        Lowering("two_stages", FftConvTwoStages),
        Lowering("three_stages", FftConvThreeStages),
    ),
    _prefer,
    last_of_fft_conv,
)
