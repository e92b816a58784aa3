"""edifice::GeneralizedDeltaRule, see edifice_reference.ops.generalized_delta_rule."""

from onnxscript import graph, script

from edifice_reference.ops import generalized_delta_rule

from .domain import EDIFICE, op
from .lowering import Lowering
from .matrix_state import SplitDecay
from .registry import register


@script(EDIFICE, default_opset=op)
def GeneralizedDeltaRuleScan(query, key, value, log_decay, a, b, initial):
    """A Scan over time. What is added is one product: of b and the key with what was read and the value."""
    start = op.Expand(initial, op.Concat(op.Shape(value, start=0, end=1), op.Shape(initial, start=1, end=4), axis=0))
    rows = op.Constant(value_ints=[3])
    columns = op.Constant(value_ints=[4])
    kept, change = SplitDecay(log_decay)
    written = op.Concat(op.Unsqueeze(b, columns), op.Unsqueeze(key, columns), axis=4)

    @graph()
    def step(state, q, read, written_t, v, kept_t, change_t):
        values = op.Concat(op.MatMul(read, state), v, axis=2)
        after = kept_t * state + (change_t * state + op.MatMul(written_t, values))
        y_t = op.MatMul(q, after)
        return after, y_t

    final, y = op.Scan(
        start,
        op.Unsqueeze(query, rows),
        op.Unsqueeze(a, rows),
        written,
        op.Unsqueeze(value, rows),
        op.Unsqueeze(kept, columns),
        op.Unsqueeze(change, columns),
        body=step,
        num_scan_inputs=6,
        scan_input_axes=[1, 1, 1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return op.Squeeze(y, rows), final


@script(EDIFICE, default_opset=op)
def GeneralizedDeltaRuleFrame(query, key, value, log_decay, a, b, initial):
    """The step alone."""
    row = op.Constant(value_ints=[2])
    column = op.Constant(value_ints=[3])
    kept, change = SplitDecay(op.Unsqueeze(log_decay, column))
    read = op.MatMul(op.Unsqueeze(a, row), initial)
    added = op.Unsqueeze(b, column) * read + op.Unsqueeze(key, column) * op.Unsqueeze(value, row)
    final = kept * initial + (change * initial + added)
    y = op.Squeeze(op.MatMul(op.Unsqueeze(query, row), final), row)
    return y, final


register(
    generalized_delta_rule,
    (Lowering("scan", GeneralizedDeltaRuleScan), Lowering("frame", GeneralizedDeltaRuleFrame, is_frame=True)),
)
