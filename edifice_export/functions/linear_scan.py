"""edifice::LinearScan, see edifice_reference.ops.linear_scan."""

from onnxscript import graph, script

from .domain import EDIFICE, op

__all__ = ["LinearScan", "LinearScanFrame"]


@script(EDIFICE, default_opset=op)
def LinearScan(x, log_decay, initial):
    """A Scan over time of h + ((exp(z) - 1) * h + x): what is left of a frame after thousands depends on 1 - exp(z),
    which exp alone rounds away. exp(z) - 1 is t + t * exp(z) with t = tanh(z / 2), exact to rounding for every z. Where
    little is left of h after one frame, it is exp(z) * h + x in the plain form.
    """
    half = op.CastLike(op.Constant(value_float=0.5), x)
    t = op.Tanh(log_decay * half)
    decay = op.Exp(log_decay)
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    one = op.CastLike(op.Constant(value_float=1.0), x)
    slow = op.Greater(decay, half)
    kept = op.Where(slow, one, zero)
    change = op.Where(slow, t + t * decay, decay)
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=2), axis=0))

    @graph()
    def step(h, x_t, kept_t, change_t):
        h_next = kept_t * h + (change_t * h + x_t)
        h_out = op.Identity(h_next)
        return h_out, h_next

    final, y = op.Scan(
        start, x, kept, change, body=step, num_scan_inputs=3, scan_input_axes=[1, 1, 1], scan_output_axes=[1]
    )
    return y, final


@script(EDIFICE, default_opset=op)
def LinearScanFrame(x, log_decay, initial):
    """The step alone."""
    half = op.CastLike(op.Constant(value_float=0.5), x)
    t = op.Tanh(log_decay * half)
    decay = op.Exp(log_decay)
    slow = op.Greater(decay, half)
    kept = op.CastLike(slow, x)
    change = op.Where(slow, t + t * decay, decay)
    final = kept * initial + (change * initial + x)
    y = op.Identity(final)
    return y, final
