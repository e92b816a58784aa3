"""Numbers that the command line and the library share. Importing this imports nothing else."""

from __future__ import annotations

__all__ = ["DEFAULT_OPSET", "OPSETS", "PRECISIONS", "TARGETS", "TOLERANCE"]

OPSETS = range(18, 26)
"""ONNX operator sets that torch's exporter makes; ONNX Runtime 1.30 and 1.31 take all of them."""

DEFAULT_OPSET = 20
"""The newest that DirectML and the runtimes of 2024 take."""

PRECISIONS = ("fp32",)
"""Types that a graph computes in. Scripts that ask for one go on getting just that when there are more."""

TARGETS = {"portable": True, "cpu": True, "cuda": False, "dml": False, "web": False}
"""What graphs are lowered for, and whether a Scan is fast there: DirectML and WebGPU have none, CUDA launches kernels
at every step. All graphs are plain ONNX, and right everywhere."""

TOLERANCE = 1e-5
"""Largest error allowed, absolute, or relative to the largest reference output where that is above 1."""
