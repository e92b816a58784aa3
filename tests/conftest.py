"""Shared by all tests: a tiny bundle of every architecture, each built once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_reference.models.registry import ARCHITECTURES

# Tiny models gain nothing from threads and lose much to them where several tests run at once; the same for commands
# that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# torch makes this folder when it first traces: not where a test looks for traces of its own.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor")

GOLDEN = Path(__file__).parent / "golden"

TINY: dict[str, Any] = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
"""Options that every architecture has, small enough to build in seconds."""


ANY = "hymba"
"""The architecture of tests to which it does not matter, such as those of a bundle's files."""


@contextlib.contextmanager
def shared_place(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path for what tests share, those of other processes too; it is this process's own until the block ends."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "bundles"
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared / name


def built_once(name: str, tmp_path_factory: pytest.TempPathFactory, architecture: str, **options: Any) -> ee.Bundle:
    """A bundle that all tests share, those of other processes too; tests that change one must copy it."""
    with shared_place(name, tmp_path_factory) as place:
        if not place.exists():
            ee.build(architecture, output=place, seed=1, **options, **TINY)
        return open_bundle(place)


def tiny_bundle(name: str, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The tiny bundle of an architecture, with all graphs."""
    return built_once(name, tmp_path_factory, name)


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The tiny bundle of every architecture in turn."""
    return tiny_bundle(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def any_bundle(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The tiny bundle of ANY."""
    return tiny_bundle(ANY, tmp_path_factory)


@pytest.fixture(scope="session")
def primed(tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """A stream whose meta tokens go through every block: its initial states are no constants."""
    return built_once("primed", tmp_path_factory, "hymba", meta_propagation=True, graph="stream")


any_architecture = pytest.mark.parametrize("bundle", [ANY], indirect=True)

"""ANY alone."""

others_slow = pytest.mark.parametrize(
    "bundle",
    [ANY, *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != ANY)],
    indirect=True,
)
"""ANY in the main suite, and the other architectures among the slow tests."""
