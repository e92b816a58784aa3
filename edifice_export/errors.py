"""What can go wrong, by exit status. Every message says what was asked, what was found and what to do."""

from __future__ import annotations

__all__ = ["CheckError", "ExportError", "RequestError", "brief"]


class ExportError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 1


class RequestError(ExportError, ValueError):
    """The request can't be met as it was made: a bad option, an unreadable file, a provider that is not usable."""

    exit_status = 2


class CheckError(ExportError):
    """A check failed: parity, a corrupted bundle, an export that froze a dimension."""


_MOST = 300
"""Characters of another library's error that a message may carry: it may quote a file at length."""


def brief(error: object) -> str:
    """What an error of another library says, in one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"
