"""What this machine has: memory, and torch, which only building and comparing with the reference model need."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .errors import RequestError

__all__ = ["SMALL", "physical_memory", "require_torch", "small_model_threads", "torch_threads", "why_no_torch"]

SMALL = 2**25
"""Parameters up to which a model is small."""


def physical_memory() -> int | None:
    """Bytes of memory of this machine, or None where the system doesn't say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def why_no_torch() -> str | None:
    """What importing torch says where it fails, or None where it can be imported.

    Raises:
        FileNotFoundError: the working folder is gone, where torch's libraries would end the process.
    """
    os.getcwd()
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # an OSError is a broken installation
        return str(error)
    return None


def require_torch(what: str = "build") -> None:
    """Refuses to go on without torch.

    Args:
        what: needs it.

    Raises:
        RequestError: says what to install.
    """
    reason = why_no_torch()
    if reason is not None:
        raise RequestError(
            f"{what} needs torch, which can't be imported here ({reason}); install it with `pip install torch`"
        )


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Has torch, where it is here, compute with this many threads."""
    if why_no_torch() is not None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_model_threads(parameters: int) -> contextlib.AbstractContextManager[None]:
    """Has torch compute small models with one thread.

    They gain little from more, and where other processes want the same cores they lose much: a build takes minutes.
    """
    return torch_threads(1) if parameters <= SMALL else contextlib.nullcontext()
