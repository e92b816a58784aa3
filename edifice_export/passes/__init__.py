"""Rewrites of abstract graphs, one per file: each keeps what the graph computes and makes it cheaper."""

from __future__ import annotations

import onnx_ir as ir

from .fast_softplus import fast_softplus
from .fold_constants import fold_constants
from .last_frames import last_frames
from .merge_projections import merge_projections
from .separate_projections import separate_projections
from .sizes_as_vectors import sizes_as_vectors
from .whole_softplus import whole_softplus

__all__ = ["PASSES", "optimize"]

PASSES = (
    fold_constants,
    whole_softplus,
    fast_softplus,
    separate_projections,
    last_frames,
    merge_projections,
    sizes_as_vectors,
)


def optimize(model: ir.Model) -> None:
    """Applies every pass, in place."""
    for rewrite in PASSES:
        rewrite(model)
