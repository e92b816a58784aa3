"""What tests of streams share: frames, what the float64 reference makes of them, and what a state holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from conftest import TINY

import edifice_export as ee
from edifice_export.bundle.manifest import FileEntry
from edifice_export.programs.reference_model import reference_of

WIDTH, HIDDEN, WINDOW = (TINY[name] for name in ("embed_dim", "hidden_size", "window_size"))

Contents = dict[str, np.ndarray]

_references: dict[str, Any] = {}


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 [*shape, embed_dim] of a tiny bundle."""
    return np.random.default_rng(seed).standard_normal((*shape, WIDTH)).astype(np.float32)


def reference(bundle: ee.Bundle) -> Any:
    """The float64 reference of a bundle, made once."""
    key = str(bundle.path)
    if key not in _references:
        _references[key] = reference_of(bundle).double()
    return _references[key]


def expected(bundle: ee.Bundle, sequence: np.ndarray) -> np.ndarray:
    """The reference's output at every frame of streams from their start, float64 [batch, sequence, hidden]."""
    with torch.no_grad():
        result: np.ndarray = reference(bundle).forward_stream(torch.tensor(sequence).double()).numpy()
    return result


def steps(stream: ee.Stream, sequence: np.ndarray) -> np.ndarray:
    """A stream's output at every frame of [batch, sequence, embed_dim], fed one by one."""
    return np.stack([stream.step(sequence[:, t]) for t in range(sequence.shape[1])], axis=1)


def contents(stream: ee.Stream, snapshot: ee.Snapshot | None = None) -> Contents:
    """A copy of the numbers of a stream's state, or of one that it was in."""
    return stream._download((snapshot or stream.snapshot()).state)


def same(one: Contents, other: Contents) -> bool:
    """Whether two states are bitwise equal."""
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def agrees(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> bool:
    """Whether two arrays differ by at most 1e-5, or 1e-5 of the largest number where that is above 1."""
    error = np.abs(found.astype(np.float64) - wanted).max()
    return found.shape == wanted.shape and bool(error <= tolerance * max(1.0, np.abs(wanted).max()))


def with_other_weights(bundle: ee.Bundle) -> ee.Bundle:
    """The bundle, as it would be if its weights were others."""
    files = {**bundle.manifest.files, bundle.manifest.reference: FileEntry(1, "0" * 64)}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))
