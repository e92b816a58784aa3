"""edifice::DiagonalScan, see edifice_reference.ops.diagonal_scan."""

from onnxscript import graph, script

from .domain import EDIFICE, op

__all__ = ["DiagonalScan"]


@script(EDIFICE, default_opset=op)
def DiagonalScan(x, log_decay, b, c):
    """A Scan over time whose state is [batch, state, channels], as in SelectiveScan; exp(z) - 1 is made once, as in
    LinearScan.

    It is carried along as a state: OpenVINO can't convert a body that captures what was made of a cast constant.
    """
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    half = op.CastLike(op.Constant(value_float=0.5), x)
    one = op.CastLike(op.Constant(value_float=1.0), x)
    z = op.Unsqueeze(log_decay, op.Constant(value_ints=[1]))
    t = op.Tanh(z * half)
    decay = op.Exp(z)
    slow = op.Greater(decay, half)
    initial_kept = op.Where(slow, one, zero)
    initial_change = op.Where(slow, t + t * decay, decay)
    shape = op.Concat(op.Shape(x, start=0, end=1), op.Shape(b, start=2, end=3), op.Shape(x, start=2, end=3), axis=0)
    initial = op.CastLike(op.ConstantOfShape(shape), x)

    @graph()
    def step(h, kept, change, x_t, b_t, c_t):
        added = op.MatMul(op.Unsqueeze(b_t, [2]), op.Unsqueeze(x_t, [1]))
        h_next = kept * h + (change * h + added)
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(c_t, [1]), h_next), [1])
        h_out = op.Identity(h_next)
        kept_out = op.Identity(kept)
        change_out = op.Identity(change)
        return h_out, kept_out, change_out, y_t

    _final, _kept, _change, y = op.Scan(
        initial,
        initial_kept,
        initial_change,
        x,
        b,
        c,
        body=step,
        num_scan_inputs=3,
        scan_input_axes=[1, 1, 1],
        scan_output_axes=[1],
    )
    return y
