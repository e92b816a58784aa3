"""edifice::FlooredLayerNorm, see edifice_reference.ops.floored_layer_norm."""

from onnxscript import script

from edifice_reference.ops import floored_layer_norm

from .domain import EDIFICE, op
from .lowering import Lowering
from .registry import register


@script(EDIFICE, default_opset=op)
def FlooredLayerNorm(x, weight, bias, epsilon: float):
    """The definition, operator by operator: LayerNormalization has no floor."""
    last = op.Constant(value_ints=[-1])
    floor = op.CastLike(op.Constant(value_float=epsilon), x)
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    centred = x - op.ReduceMean(x, last, keepdims=1)
    variance = op.ReduceMean(centred * centred, last, keepdims=1)
    variance = op.Where(op.GreaterOrEqual(variance, floor), variance, zero)
    return centred / op.Sqrt(variance + floor) * weight + bias


register(floored_layer_norm, (Lowering("plain", FlooredLayerNorm),))
