"""A stranger's modules, their bundles, each made once, and modules of which parts can be put otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_place
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_export.programs.module_program import ModuleProgram
from edifice_export.programs.source import load_source
from edifice_export.specification import InputSpec, shape_of

STRANGERS = Path(__file__).parent / "strangers"


SOURCES = {
    name: f"{STRANGERS}/{file}.py:{name}"
    for file, names in {
        "models": ("token_model", "both_ways", "two_and_two", "live", "recurrent", "recall"),
        "leaky_scan": ("leaky",),
    }.items()
    for name in names
}


STREAMS = ("live", "recurrent", "recall")


def exported(name: str, tmp_path_factory: pytest.TempPathFactory) -> ee.Bundle:
    """The bundle of a source, made once for all tests."""
    with shared_place(f"module_{name}", tmp_path_factory) as place:
        if not place.exists():
            made = load_source(SOURCES[name])
            ee.export(
                made.module,
                made.args,
                dynamic_shapes=made.dynamic_shapes,
                output_names=made.output_names,
                output=place,
            )
        return open_bundle(place)


def program(name: str) -> ModuleProgram:
    return ModuleProgram(load_source(SOURCES[name]))


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the largest number."""
    assert found.shape == wanted.shape
    wanted = wanted.astype(np.float64)
    return float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))


def frames_of(model: ee.Model, batch: int, length: int) -> list[InputSpec]:
    return [
        InputSpec(spec.name, spec.dtype, shape_of(batch, length, *spec.shape[1:]), spec.values)
        for spec in model.bundle.manifest.own_tensors("stream")[0]
    ]


FREE = ({0: "batch", 1: "time"},)


class Recurs(nn.Module):
    """A loop over time."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
        return h


class Does(nn.Module):
    """Whatever it is given to do."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class Steps(nn.Module):
    """A running sum, of which parts can be put otherwise."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        vars(self).update(changed)

    def initial_state(self, batch: int) -> Any:
        return {"sum": torch.zeros(batch, 4)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        total = state["sum"] + x
        return total, {"sum": total}

    def extend(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        y = torch.cumsum(x, 1) + state["sum"][:, None]
        return y, {"sum": y[:, -1]}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)
