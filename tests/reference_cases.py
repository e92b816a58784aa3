"""Tiny reference models in float64, and which of them to try."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor

from edifice_reference.models.config import NUMERICS
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda known: known.name)
each_numerics = pytest.mark.parametrize("numerics", NUMERICS)


def make(architecture: Architecture, numerics: str = "standard", seed: int = 0, **options: Any) -> Any:
    model = architecture.model_class(architecture.config_class(**{**TINY, **options}), numerics).double().eval()
    initialize(model, seed)
    return model


def sequence(batch: int, length: int, width: int = TINY["embed_dim"], seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A model that has a stream."""

    architecture: Architecture
    numerics: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.architecture.name, self.numerics, *(f"{k}={v}" for k, v in self.options.items())])

    def make(self, **options: Any) -> Any:
        return make(self.architecture, self.numerics, **{**self.options, **options})


USUAL = [
    Streamed(architecture, numerics, {})
    for architecture in ARCHITECTURES.values()
    for numerics in NUMERICS
    if make(architecture, numerics).why_no_stream is None
]

ODD = [
    Streamed(ARCHITECTURES[name], "standard", options)
    for name, options in (
        ("h3", {"conv_size": 1, "state_size": 1, "window_size": 1}),
        ("hyena", {"order": 1, "window_size": 2}),
        ("hyena", {"order": 3}),
        ("hyena", {"window_size": 1}),
        ("hymba", {"num_meta_tokens": 0, "state_size": 1}),
        ("hymba", {"meta_propagation": True}),
        ("hymba", {"meta_propagation": True, "num_meta_tokens": 0, "window_size": 1}),
        ("ss_transformer", {"conv_size": 1, "state_size": 1, "window_size": 1}),
        ("ss_transformer", {"conv_size": 9, "num_heads": 1, "head_dim": 1}),
    )
]

each_stream = pytest.mark.parametrize("case", [*USUAL, *ODD], ids=str)
