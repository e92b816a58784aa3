"""The architectures: the one list that everything else iterates over. Importing it does not import torch."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .config import Config, OptionError

if TYPE_CHECKING:
    from .contract import ReferenceModel

__all__ = ["ARCHITECTURES", "Architecture", "get_architecture"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture: its name on the command line and where to find its parts.

    The module of the same name holds `<class_name>` and `EDIFICE_NAMES`; `<name>_config` holds `<class_name>Config`.
    """

    name: str
    class_name: str
    edifice_module: str
    summary: str

    def _load(self, module: str, attribute: str) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), attribute)

    @property
    def config_class(self) -> type[Config]:
        """The dataclass of its options. Does not import torch."""
        return self._load(f"{self.name}_config", f"{self.class_name}Config")

    @property
    def model_class(self) -> Callable[..., ReferenceModel]:
        """The torch module, constructed from (config, numerics). Imports torch."""
        return self._load(self.name, self.class_name)

    @property
    def edifice_names(self) -> Mapping[str, str]:
        """Edifice's name of every module or parameter."""
        return self._load(self.name, "EDIFICE_NAMES")


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="h3",
            class_name="H3",
            edifice_module="Edifice.SSM.H3",
            summary="two state-space models, quick and slow to forget, multiplied, then a short convolution",
        ),
        Architecture(
            name="hyena",
            class_name="Hyena",
            edifice_module="Edifice.SSM.Hyena",
            summary="convolutions as long as the window, from small networks, and gates between them",
        ),
        Architecture(
            name="hymba",
            class_name="Hymba",
            edifice_module="Edifice.SSM.Hymba",
            summary="Mamba and attention side by side in every block, mixed by a learned gate",
        ),
        Architecture(
            name="ss_transformer",
            class_name="SSTransformer",
            edifice_module="Edifice.SSM.SSTransformer",
            summary="a gated running average and attention side by side in every block, mixed by a learned gate",
        ),
    )
}


def get_architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        OptionError: there is none; the message names the nearest and all there are.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), ARCHITECTURES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"unknown architecture {name!r}: {hint}There are: {', '.join(sorted(ARCHITECTURES))}")
