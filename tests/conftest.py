"""Shared by all tests: a tiny bundle of every architecture, each built once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import edifice_export as ee
from edifice_reference.registry import ARCHITECTURES

# Tiny models gain nothing from threads and lose much to them where several tests run at once; the same for commands
# that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

GOLDEN = Path(__file__).parent / "golden"

TINY: dict[str, Any] = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
"""Options that every architecture has, small enough to build in seconds."""


ANY = "hymba"
"""The architecture of tests to which it does not matter, such as those of a bundle's files."""

BUNDLES: dict[str, ee.Bundle] = {}


def tiny_bundle(name: str, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """A tiny bundle of an architecture, built once; tests that change one must copy it."""
    if name not in BUNDLES:
        BUNDLES[name] = ee.build(name, output=tmp_path_factory.mktemp("bundles") / name, seed=1, **TINY)
    return BUNDLES[name]


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The tiny bundle of every architecture in turn."""
    return tiny_bundle(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def any_bundle(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The tiny bundle of ANY."""
    return tiny_bundle(ANY, tmp_path_factory)


any_architecture = pytest.mark.parametrize("bundle", [ANY], indirect=True)
