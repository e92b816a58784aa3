"""Rewrites of abstract graphs, one per file: each keeps what the graph computes and makes it cheaper."""

from __future__ import annotations

import onnx_ir as ir

from .merge_projections import merge_projections
from .whole_softplus import whole_softplus

__all__ = ["PASSES", "optimize"]

PASSES = (whole_softplus, merge_projections)


def optimize(model: ir.Model) -> None:
    """Applies every pass, in place."""
    for rewrite in PASSES:
        rewrite(model)
