"""Real parameters, inputs and outputs of Edifice, as reference models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from edifice_export.programs.reference_model import make_reference
from edifice_export.weights import read_checkpoint
from edifice_reference.models.config import Numerics

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path for path in GOLDEN.glob("*.safetensors") if not path.stem.endswith("_taps"))

SMALL = [path.stem for path in CASES if path.stem.endswith("_small")]
"""One of each architecture of which there is one: `<architecture>_small`."""


def load_case(path: Path, numerics: Numerics = "edifice") -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The reference model with the parameters of a case, and the case's input and outputs."""
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture is not None
    assert checkpoint.options is not None
    config = checkpoint.architecture.config_class(**checkpoint.options)
    with safe_open(path, framework="pt") as file:
        example = {name: file.get_tensor(name) for name in ("state_sequence", "output", "output_f64")}
    return make_reference(checkpoint.architecture, config, numerics, 0, checkpoint), example


def metadata(path: Path) -> dict[str, object]:
    """What Edifice itself said of the case."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    facts = ("actual_param_count", "output_size", "param_count", "recommended_defaults")
    return {name: json.loads(found[name]) for name in facts}


def architecture_of(path: Path) -> str:
    """The name of the architecture that a case is of."""
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture is not None
    return checkpoint.architecture.name
