"""Whether torch is here: only building, and verifying against the float64 reference, need it."""

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


def require_torch() -> None:
    """Refuses to go on without torch.

    Raises:
        RequestError: says what to install.
    """
    reason = why_no_torch()
    if reason is not None:
        raise RequestError(
            f"build needs torch, which can't be imported here ({reason}); install it with `pip install torch`"
        )
