"""Whether torch is here: only building, and what compares with the reference model, need it."""

from __future__ import annotations

from .errors import RequestError

__all__ = ["require_torch", "why_no_torch"]


def why_no_torch() -> str | None:
    """What importing torch says where it fails, or None where it can be imported."""
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
