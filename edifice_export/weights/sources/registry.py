"""Registry: the sources of weights, which tell by the names of tensors whose they are."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edifice_reference.models.registry import Architecture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OF_GRAPHS", "SOURCES", "Named", "Source", "register"]

OF_GRAPHS = "graph/"
"""What the names of tensors begin with that the graphs of a bundle have beside the parameters: nobody's weights."""


@dataclasses.dataclass(frozen=True)
class Named:
    """Tensors under the names that a source has for them.

    Attributes:
        names: by what the file calls them; tensors that are no parameters are left out.
        prefix: what all of them had before their names, and no longer have.
    """

    names: Mapping[str, str]
    prefix: str = ""


class Source(abc.ABC):
    """Whose names and layouts tensors have. `own` names are those of the reference models.

    Attributes:
        name: what `convert --names` calls it.
        numerics: those that weights of it were trained with, where nothing says others.
        leaves_out_defaults: whether, where a file of it states options, those that it does not had their defaults.
    """

    name: str
    numerics: str
    leaves_out_defaults: bool

    @abc.abstractmethod
    def read(self, names: Sequence[str]) -> Named | None:
        """The tensors of a file, by their names in it; None if they are not of this source."""

    @abc.abstractmethod
    def filed(self, theirs: str) -> str:
        """What safetensors call a tensor of this source."""

    @abc.abstractmethod
    def titles(self, architecture: Architecture) -> tuple[str, ...]:
        """What files of this source call an architecture; the first is what is written."""

    @abc.abstractmethod
    def theirs(self, own: str, architecture: Architecture) -> str:
        """The name of a parameter.

        Raises:
            RequestError: there is none.
        """

    @abc.abstractmethod
    def own(self, theirs: str, architecture: Architecture) -> str | None:
        """The own name of a parameter; None if the architecture has no such parameter for any options."""

    @abc.abstractmethod
    def knows(self, theirs: str, architecture: Architecture) -> bool:
        """Whether the architecture is known to have such a parameter, for some options."""

    @abc.abstractmethod
    def lay_out(self, tensor: Tensor, own: str) -> Tensor:
        """A parameter in this source's layout from the reference models', or back: what it does undoes itself."""


SOURCES: dict[str, Source] = {}
"""By name. Names that none of them knows are our own, see own.OWN."""


def register(source: Source) -> None:
    """Has files looked at for this source, and `convert` write it."""
    SOURCES[source.name] = source
