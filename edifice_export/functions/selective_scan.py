"""edifice::SelectiveScan, see edifice_reference.ops.selective_scan."""

from onnxscript import graph, script

from .domain import EDIFICE, op

__all__ = ["SelectiveScan", "SelectiveScanFrame"]


@script(EDIFICE, default_opset=op)
def SelectiveScan(x, delta, a, b, c, initial):
    """A Scan over time. The state is kept as [batch, state, channels], which makes the outer product of b and x and the
    read-out with c matrix products; the step is discretised inside, so that memory grows with T * channels only. Of the
    decay exp(z) it is exp(z) - 1 = t + t * exp(z), t = tanh(z / 2), that is computed, see LinearScan.
    """
    rates = op.Transpose(a, perm=[1, 0])
    half_delta = delta * op.CastLike(op.Constant(value_float=0.5), x)
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=3), axis=0))

    @graph()
    def step(h, x_t, half_delta_t, b_t, c_t):
        half_z = op.Unsqueeze(half_delta_t, [1]) * rates
        t = op.Tanh(half_z)
        change = t + t * op.Exp(half_z + half_z)
        h_next = h + (change * h + op.MatMul(op.Unsqueeze(b_t, [2]), op.Unsqueeze(x_t, [1])))
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(c_t, [1]), h_next), [1])
        h_out = op.Identity(h_next)
        return h_out, y_t

    final, y = op.Scan(
        start,
        x,
        half_delta,
        b,
        c,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return y, final


@script(EDIFICE, default_opset=op)
def SelectiveScanFrame(x, delta, a, b, c, initial):
    """The step alone, with what depends on the rates alone apart, so that a runtime makes it when it loads a model."""
    rates = op.Transpose(a, perm=[1, 0])
    half_rates = rates * op.CastLike(op.Constant(value_float=0.5), x)
    one = op.Constant(value_ints=[1])
    row = op.Unsqueeze(delta, one)
    t = op.Tanh(row * half_rates)
    change = t + t * op.Exp(row * rates)
    added = op.Unsqueeze(b, op.Constant(value_ints=[2])) * op.Unsqueeze(x, one)
    final = initial + (change * initial + added)
    y = op.Squeeze(op.MatMul(op.Unsqueeze(c, one), final), one)
    return y, final
