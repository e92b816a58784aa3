"""Shared by all tests: a tiny bundle of every architecture, built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edifice_export as ee
from edifice_reference.registry import ARCHITECTURES

# Tiny models gain nothing from threads and lose much to starting them.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"

TINY: dict[str, Any] = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
"""Options that every architecture has, small enough to build in seconds."""


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """A tiny bundle; tests that change one must copy it."""
    return ee.build(request.param, output=tmp_path_factory.mktemp("bundles") / request.param, seed=1, **TINY)
