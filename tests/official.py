"""Numbers that official code gave, in float64: tests/golden/official."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

__all__ = ["load_official"]


def load_official(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The config, the parameters by their official names, and the inputs and outputs."""
    with safe_open(Path(__file__).parent / f"golden/official/{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in [*file.keys()]}
        config = json.loads(file.metadata()["config"])
    parts = [
        {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for part in ("params.", "io.")
    ]
    return config, parts[0], parts[1]
