"""edifice::DiagonalScan, see edifice_reference.ops.diagonal_scan."""

from onnxscript import graph, script

from .domain import EDIFICE, op

__all__ = ["DiagonalScan", "DiagonalScanFrame"]


@script(EDIFICE, default_opset=op)
def DiagonalScan(x, log_decay, b, c, initial):
    """A Scan over time whose state is [batch, groups, state, channels], as in SelectiveScan; exp(z) - 1 is made once,
    as in LinearScan.

    It is carried along as a state: OpenVINO can't convert a body that captures what was made of a cast constant.
    """
    half = op.CastLike(op.Constant(value_float=0.5), x)
    z = op.Unsqueeze(log_decay, op.Constant(value_ints=[2]))
    t = op.Tanh(z * half)
    initial_change = t + t * op.Exp(z)
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0))

    @graph()
    def step(h, change, x_t, b_t, c_t):
        added = op.MatMul(op.Unsqueeze(b_t, [3]), op.Unsqueeze(x_t, [1, 2]))
        h_next = h + (change * h + added)
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(c_t, [2]), h_next), [2])
        h_out = op.Identity(h_next)
        change_out = op.Identity(change)
        return h_out, change_out, y_t

    final, _change, y = op.Scan(
        start,
        initial_change,
        x,
        b,
        c,
        body=step,
        num_scan_inputs=3,
        scan_input_axes=[1, 1, 1],
        scan_output_axes=[1],
    )
    return y, final


@script(EDIFICE, default_opset=op)
def DiagonalScanFrame(x, log_decay, b, c, initial):
    """The step alone."""
    half = op.CastLike(op.Constant(value_float=0.5), x)
    z = op.Unsqueeze(log_decay, op.Constant(value_ints=[2]))
    t = op.Tanh(z * half)
    change = t + t * op.Exp(z)
    added = op.Unsqueeze(b, op.Constant(value_ints=[3])) * op.Unsqueeze(x, op.Constant(value_ints=[1, 2]))
    final = initial + (change * initial + added)
    y = op.Squeeze(op.MatMul(op.Unsqueeze(c, op.Constant(value_ints=[2])), final), op.Constant(value_ints=[2]))
    return y, final
