"""edifice::SelectiveScan, see edifice_reference.ops.selective_scan.

The state is kept as [batch, state, channels], which makes the outer product of b and x and the read-out with c
products of matrices.
"""

import numpy as np
from onnxscript import graph, script

from edifice_reference.ops import selective_scan

from .blocked_scan import BlockedScan
from .domain import EDIFICE, op
from .lowering import Call, Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def SelectiveScanPlain(x, delta, a, b, c, initial):
    """A Scan over time, discretised inside, so that memory grows with T * channels only.

    A decay is rounded as exp(z): over T frames of the slowest decays that adds up to T * 2^-25 of the state at most,
    to half of that on average.
    """
    rates = op.Transpose(a, perm=[1, 0])
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=3), axis=0))
    rows = op.Constant(value_ints=[2])
    x_rows = op.Unsqueeze(x, rows)
    delta_rows = op.Unsqueeze(delta, rows)
    b_columns = op.Unsqueeze(b, op.Constant(value_ints=[3]))
    c_rows = op.Unsqueeze(c, rows)

    @graph()
    def step(h, x_t, delta_t, b_t, c_t):
        h_next = op.Exp(delta_t * rates) * h + op.MatMul(b_t, x_t)
        y_t = op.MatMul(c_t, h_next)
        return h_next, y_t

    final, y = op.Scan(
        start,
        x_rows,
        delta_rows,
        b_columns,
        c_rows,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return op.Squeeze(y, rows), final


@script(EDIFICE, default_opset=op)
def SelectiveScanExact(x, delta, a, b, c, initial):
    """The same with h + (exp(z) - 1) * h in place of exp(z) * h: right at thousands of frames, see LinearScanFrame.

    exp(z) - 1 is 2 t / (1 - t), t = tanh(z / 2), here: one exponential less.
    """
    # Half of the step and not of the rates: OpenVINO can't convert a body that captures what a cast constant made.
    rates = op.Transpose(a, perm=[1, 0])
    half_delta = delta * op.CastLike(op.Constant(value_float=0.5), x)
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=3), axis=0))
    rows = op.Constant(value_ints=[2])
    x_rows = op.Unsqueeze(x, rows)
    delta_rows = op.Unsqueeze(half_delta, rows)
    b_columns = op.Unsqueeze(b, op.Constant(value_ints=[3]))
    c_rows = op.Unsqueeze(c, rows)

    @graph()
    def step(h, x_t, delta_t, b_t, c_t):
        t = op.Tanh(delta_t * rates)
        change = (t + t) / (op.CastLike(op.Constant(value_float=1.0), t) - t)
        h_next = h + (change * h + op.MatMul(b_t, x_t))
        y_t = op.MatMul(c_t, h_next)
        return h_next, y_t

    final, y = op.Scan(
        start,
        x_rows,
        delta_rows,
        b_columns,
        c_rows,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return op.Squeeze(y, rows), final


@script(EDIFICE, default_opset=op)
def SelectiveScanState(x, delta, a, b, c, initial):
    """SelectiveScanExact for one read-out, the last frame's: no other frame is read out."""
    # Half of the step and not of the rates: OpenVINO can't convert a body that captures what a cast constant made.
    rates = op.Transpose(a, perm=[1, 0])
    half_delta = delta * op.CastLike(op.Constant(value_float=0.5), x)
    start = op.Expand(initial, op.Concat(op.Shape(x, start=0, end=1), op.Shape(initial, start=1, end=3), axis=0))
    rows = op.Constant(value_ints=[2])
    x_rows = op.Unsqueeze(x, rows)
    delta_rows = op.Unsqueeze(half_delta, rows)
    b_columns = op.Unsqueeze(b, op.Constant(value_ints=[3]))

    @graph()
    def step(h, x_t, delta_t, b_t):
        t = op.Tanh(delta_t * rates)
        change = (t + t) / (op.CastLike(op.Constant(value_float=1.0), t) - t)
        return h + (change * h + op.MatMul(b_t, x_t))

    final = op.Scan(start, x_rows, delta_rows, b_columns, body=step, num_scan_inputs=3, scan_input_axes=[1, 1, 1])
    y = op.MatMul(c, final)
    return y, final


@script(EDIFICE, default_opset=op)
def SumOfFrames(x):
    """The sum over time, [batch, 1, channels], as a product: ONNX Runtime's ReduceSum is several times slower there."""
    one = op.CastLike(op.Constant(value_float=1.0), x)
    units = op.Constant(value_ints=[1, 1])
    return op.MatMul(op.Expand(one, op.Concat(units, op.Shape(x, start=1, end=2), axis=0)), x)


@script(EDIFICE, default_opset=op)
def SelectiveScanLast(x, delta, a, b, c, initial):
    """One read-out, the last frame's, of all frames at once: what is left of a frame depends on the steps after it."""
    one = op.Constant(value_int=1)
    axis1 = op.Constant(value_ints=[1])
    rates = op.Transpose(a, perm=[1, 0])
    after = op.Unsqueeze(op.CumSum(delta, one, exclusive=1, reverse=1), op.Constant(value_ints=[2]))
    read = op.Unsqueeze(b * c, op.Constant(value_ints=[2]))
    weights = op.Squeeze(op.MatMul(read, op.Exp(after * rates)), op.Constant(value_ints=[2]))
    left = op.Exp(SumOfFrames(delta) * rates) * initial
    y = SumOfFrames(weights * x) + op.MatMul(c, left)
    each = op.Exp(after * rates) * op.Unsqueeze(x, op.Constant(value_ints=[2]))
    added = op.ReduceSum(each * op.Unsqueeze(b, op.Constant(value_ints=[3])), axis1, keepdims=0)
    return y, added + left


@script(EDIFICE, default_opset=op)
def SelectiveScanPowers(x, delta, a, b, c, initial):
    """SelectiveScanLast where the rates are multiples of the first, 1 to N: what is left of a frame in state n is a
    power of what is left in the first, and the read-out a polynomial of that, by a Scan over states. `left` is carried
    along as one, see AttendBlocks.
    """
    one = op.Constant(value_int=1)
    axis1 = op.Constant(value_ints=[1])
    rates = op.Transpose(a, perm=[1, 0])
    slowest = op.Slice(rates, op.Constant(value_ints=[0]), axis1, op.Constant(value_ints=[0]))
    left = op.Exp(op.CumSum(delta, one, exclusive=1, reverse=1) * slowest)
    read = op.Unsqueeze(b * c, op.Constant(value_ints=[3]))

    @graph()
    def step(total, left_n, read_n):
        return (total + read_n) * left_n, op.Identity(left_n)

    nothing = left - left
    weights, _left = op.Scan(
        nothing, left, read, body=step, num_scan_inputs=1, scan_input_axes=[2], scan_input_directions=[1]
    )
    past = op.Exp(SumOfFrames(delta) * rates) * initial
    y = SumOfFrames(weights * x) + op.MatMul(c, past)
    after = op.Unsqueeze(op.CumSum(delta, one, exclusive=1, reverse=1), op.Constant(value_ints=[2]))
    each = op.Exp(after * rates) * op.Unsqueeze(x, op.Constant(value_ints=[2]))
    added = op.ReduceSum(each * op.Unsqueeze(b, op.Constant(value_ints=[3])), axis1, keepdims=0)
    return y, added + past


@script(EDIFICE, default_opset=op)
def SelectiveScanBlocked(x, delta, a, b, c, initial):
    """All frames at once, in blocks: no loop over time, and memory for T * state * channels."""
    rates = op.Transpose(a, perm=[1, 0])
    rows = op.Constant(value_ints=[2])
    decay = op.Exp(op.Unsqueeze(delta, rows) * rates)
    added = op.Unsqueeze(b, op.Constant(value_ints=[3])) * op.Unsqueeze(x, rows)
    flat = op.Constant(value_ints=[0, 0, -1])
    start = op.Reshape(initial, op.Constant(value_ints=[0, -1]))
    h = op.Reshape(BlockedScan(op.Reshape(decay, flat), op.Reshape(added, flat), start), op.Shape(added))
    y = op.Squeeze(op.MatMul(op.Unsqueeze(c, rows), h), rows)
    final = op.Gather(h, op.Constant(value_int=-1), axis=1)
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


PLAIN, LAST, POWERS = 512, 128, 1024
"""Frames up to which the rounding of decays stays below 1e-5, half of PLAIN * 2^-25 for the mean frame; and up to which
all frames at once, or powers, are faster than a Scan: see `python benchmarks/ops.py selective_scan`."""


def _reads_all(call: Call) -> bool:
    x, c = call.shapes[0], call.shapes[4]
    return x is not None and c is not None and x[1] == c[1]


def _reads_one(call: Call) -> bool:
    c = call.shapes[4]
    return c is not None and c[1] == 1


def _reads_one_of_multiples(call: Call) -> bool:
    a = call.constants[2]
    return _reads_one(call) and a is not None and np.array_equal(a, a[:, :1] * np.arange(1, a.shape[1] + 1))


def _prefer(call: Call) -> tuple[str, str]:
    length = call.size(0, 1)
    frames = "any number of frames" if length is None else f"{length} frames"
    if _reads_one_of_multiples(call) and call.scans and (length is None or length <= POWERS):
        return "powers", f"one read-out of {frames}, rates that are multiples of the first"
    if _reads_one(call):
        short = not call.scans or (length is not None and length <= LAST)
        return ("last" if short else "state"), f"one read-out of {frames}" + ("" if call.scans else ", without Scan")
    if not call.scans:
        return "blocked", f"{call.target} is no good at Scan"
    if length is not None and length <= PLAIN:
        return "plain", f"{length} frames, at most {PLAIN}"
    return "exact", frames


register(
    selective_scan,
    (
        Lowering("plain", SelectiveScanPlain, takes=_reads_all),
        Lowering("exact", SelectiveScanExact, takes=_reads_all),
        Lowering("blocked", SelectiveScanBlocked, takes=_reads_all),
        Lowering("last", SelectiveScanLast, takes=_reads_one),
        Lowering("powers", SelectiveScanPowers, takes=_reads_one_of_multiples),
        Lowering("state", SelectiveScanState, takes=_reads_one),
        Lowering("frame", SelectiveScanFrame, is_frame=True),
    ),
    _prefer,
)
