"""This project's own conventions, which are torch's: the names and layouts of a reference model's state_dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edifice_reference.models.registry import Architecture

from ...errors import RequestError
from .edifice import to_edifice_name
from .registry import Named, Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OWN"]

_WRAPPERS = ("_orig_mod.", "module.", "model.")
"""What torch.compile, DistributedDataParallel and LightningModules put before every name, several of them too."""


class Own(Source):
    """See Source. Whatever is nobody else's is taken for this."""

    name = "torch"
    numerics = "standard"
    leaves_out_defaults = False  # a converted file may just not know them

    def read(self, names: Sequence[str]) -> Named:
        """See Source."""
        prefix = _prefix(names)
        return Named({name: name.removeprefix(prefix) for name in names}, prefix)

    def filed(self, theirs: str) -> str:
        """See Source."""
        return theirs

    def titles(self, architecture: Architecture) -> tuple[str, ...]:
        """See Source."""
        return (architecture.name,)

    def theirs(self, own: str, architecture: Architecture) -> str:  # noqa: ARG002
        """See Source."""
        return own

    def own(self, theirs: str, architecture: Architecture) -> str:  # noqa: ARG002
        """See Source."""
        return theirs

    def knows(self, theirs: str, architecture: Architecture) -> bool:
        """See Source."""
        try:
            to_edifice_name(theirs, architecture)
        except RequestError:
            return False
        return True

    def lay_out(self, tensor: Tensor, own: str) -> Tensor:  # noqa: ARG002
        """See Source."""
        return tensor


OWN = Own()


def _prefix(names: Sequence[str]) -> str:
    """Wrappers that all names begin with, one after the other."""
    length, first = 0, names[0] if names else ""
    while wrapper := next((each for each in _WRAPPERS if first.startswith(each, length)), None):
        if not all(name.startswith(wrapper, length) for name in names):
            break
        length += len(wrapper)
    return first[:length]
