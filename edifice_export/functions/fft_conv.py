"""edifice::FftConv, see edifice_reference.ops.fft_conv."""

import onnx
from onnxscript import script

from .domain import EDIFICE, op

__all__ = ["FftConv"]


@script(EDIFICE, default_opset=op)
def FftConv(x, kernel):
    """A Fourier transform in two stages, each a matrix product, of one size n = n1 * n2 >= 2 * window for any length.

    Frame t = n2 * t1 + t2 and frequency k = k1 + n1 * k2. The first stage goes from t1 to k1 and uses that the input is
    real (k1 up to n1 / 2) and its second half zero (t1 below n1 / 2); the second goes from t2 to k2 for each k1, the
    twiddle factors in its matrices. n1 and n2 near sqrt(n) make it n^1.5 operations. The matrices and the kernel's
    spectrum depend on no input: a runtime makes them once, when it loads the model.

    A sequence longer than the kernel makes a size negative, which a runtime refuses.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    batch = op.Shape(x, start=0, end=1)
    channels = op.Shape(x, start=2, end=3)
    length = op.Shape(x, start=1, end=2)
    window = op.Shape(kernel, start=0, end=1)

    # Types: 1 is float, 7 int64, 11 double, in which the angles are made: float would be seen.
    half_n1 = op.Cast(op.Ceil(op.Sqrt(op.Cast(window + window, to=1))), to=7)
    n1 = half_n1 + half_n1
    n2 = (window + window + n1 - one) / n1
    n = n1 * n2
    half = half_n1 * n2
    turn = op.Constant(value=onnx.helper.make_tensor("turn", 11, [], [6.283185307179586]))

    # Stage 1: [2 * (n1 / 2 + 1), n1 / 2], the rows of k1 real part first.
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    k1 = op.Range(start, op.Squeeze(half_n1 + one, axis0), step)
    t1 = op.Range(start, op.Squeeze(half_n1, axis0), step)
    around1 = op.Mod(op.Unsqueeze(k1, one) * t1, n1)
    angle1 = op.Cast(around1, to=11) * (turn / op.Cast(n1, to=11))
    rows1 = op.Concat(op.Unsqueeze(op.Cos(angle1), one), op.Neg(op.Unsqueeze(op.Sin(angle1), one)), axis=1)
    flat1 = op.Concat(op.Constant(value_ints=[-1]), half_n1, axis=0)
    stage1 = op.CastLike(op.Reshape(rows1, flat1), x)

    # Stage 2, for each k1: [2 * n2, 2 * n2] from the parts of t2 to those of k2. Its transpose is n2 times its inverse.
    t2 = op.Range(start, op.Squeeze(n2, axis0), step)
    frequency = op.Unsqueeze(k1, one) + n1 * t2
    around2 = op.Mod(op.Unsqueeze(frequency, two) * t2, n)
    angle2 = op.Cast(around2, to=11) * (turn / op.Cast(n, to=11))
    cosine = op.Cos(angle2)
    sine = op.Sin(angle2)
    stage2 = op.CastLike(op.Concat(op.Concat(cosine, sine, axis=2), op.Concat(op.Neg(sine), cosine, axis=2), axis=1), x)

    # The inverse of stage 1: frequencies other than 0 and n1 / 2 stand for two.
    edge = op.Or(op.Equal(k1, op.Constant(value_int=0)), op.Equal(k1, half_n1))
    weight = op.Cast(op.Where(edge, op.Constant(value_float=1.0), op.Constant(value_float=2.0)), to=11) / op.Cast(
        n, to=11
    )
    weighted = rows1 * op.Unsqueeze(weight, op.Constant(value_ints=[1, 2]))
    inverse1 = op.CastLike(op.Transpose(op.Reshape(weighted, flat1), perm=[1, 0]), x)
    inverse2 = op.Transpose(stage2, perm=[0, 2, 1])

    wide1 = op.Concat(half_n1, n2 * channels, axis=0)
    wide2 = op.Concat(half_n1 + one, n2 + n2, channels, axis=0)
    kernel_rest = op.CastLike(op.ConstantOfShape(op.Concat(half - window, channels, axis=0)), x)
    kernel_1 = op.MatMul(stage1, op.Reshape(op.Concat(kernel, kernel_rest, axis=0), wide1))
    kernel_2 = op.MatMul(stage2, op.Reshape(kernel_1, wide2))
    kernel_re, kernel_im = op.Split(kernel_2, num_outputs=2, axis=1)

    # The name is what a runtime's error says.
    sequence_longer_than_window = op.ConstantOfShape(op.Concat(batch, window - length, channels, axis=0))
    missing = op.CastLike(sequence_longer_than_window, x)
    rest = op.CastLike(op.ConstantOfShape(op.Concat(batch, half - window, channels, axis=0)), x)
    x_0 = op.Reshape(op.Concat(x, missing, rest, axis=1), op.Concat(batch, wide1, axis=0))
    x_2 = op.MatMul(stage2, op.Reshape(op.MatMul(stage1, x_0), op.Concat(batch, wide2, axis=0)))
    x_re, x_im = op.Split(x_2, num_outputs=2, axis=2)

    y_re = x_re * kernel_re - x_im * kernel_im
    y_im = x_re * kernel_im + x_im * kernel_re
    y_1 = op.MatMul(inverse2, op.Concat(y_re, y_im, axis=2))
    y_0 = op.MatMul(inverse1, op.Reshape(y_1, op.Concat(batch, (half_n1 + one) * two, n2 * channels, axis=0)))
    y = op.Reshape(y_0, op.Concat(batch, half, channels, axis=0))
    return op.Slice(y, zero, length, one)
