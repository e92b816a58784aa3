"""edifice::Wkv, see edifice_reference.ops.wkv."""

from onnxscript import graph, script

from edifice_reference.ops import wkv

from .domain import EDIFICE, op
from .lowering import Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def ExponentsBefore(denominator, maximum):
    """Nothing that came before has an exponent of -inf."""
    nothing = op.CastLike(op.Constant(value_float=0.0), maximum)
    none = op.CastLike(op.Constant(value_float=float("-inf")), maximum)
    return op.Where(op.Equal(denominator, nothing), none, maximum)


@script(EDIFICE, default_opset=op)
def WkvScan(key, value, log_decay, bonus, numerator, denominator, maximum):
    """A Scan over time."""
    size = op.Concat(op.Shape(key, start=0, end=1), op.Shape(key, start=2, end=3), axis=0)
    above = op.Expand(numerator, size)
    below = op.Expand(denominator, size)
    largest = op.Expand(ExponentsBefore(denominator, maximum), size)

    @graph()
    def step(a, b, m, k, v):
        favoured = k + bonus
        top = op.Max(m, favoured)
        past = op.Exp(m - top)
        now = op.Exp(favoured - top)
        y_t = (past * a + now * v) / (past * b + now)
        decayed = m + log_decay
        m_next = op.Max(decayed, k)
        left = op.Exp(decayed - m_next)
        added = op.Exp(k - m_next)
        a_next = left * a + added * v
        b_next = left * b + added
        return a_next, b_next, m_next, y_t

    a, b, m, y = op.Scan(
        above,
        below,
        largest,
        key,
        value,
        body=step,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return y, a, b, m


@script(EDIFICE, default_opset=op)
def WkvFrame(key, value, log_decay, bonus, numerator, denominator, maximum):
    """The step alone."""
    largest = ExponentsBefore(denominator, maximum)
    favoured = key + bonus
    top = op.Max(largest, favoured)
    past = op.Exp(largest - top)
    now = op.Exp(favoured - top)
    y = (past * numerator + now * value) / (past * denominator + now)
    decayed = largest + log_decay
    final = op.Max(decayed, key)
    left = op.Exp(decayed - final)
    added = op.Exp(key - final)
    above = left * numerator + added * value
    below = left * denominator + added
    return y, above, below, final


register(wkv, (Lowering("scan", WkvScan), Lowering("frame", WkvFrame, is_frame=True)))
