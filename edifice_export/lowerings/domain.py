"""The operator set that the functions belong to, and the one their bodies are written in."""

from onnxscript import opset20 as op
from onnxscript.values import Opset

__all__ = ["EDIFICE", "VERSION", "op"]

VERSION = 1
"""Of every domain of ops."""

EDIFICE = Opset("edifice", VERSION)
