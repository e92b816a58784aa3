"""What can go wrong, by exit status. Every message says what was asked, what was found and what to do."""

from __future__ import annotations

__all__ = ["CheckError", "ExportError", "NotFiniteError", "RequestError", "brief", "printable"]


def printable(text: str) -> str:
    """Text that may come from a file, such as a name in a model, as a terminal may be given it.

    What would move the cursor, hide or reorder text is escaped; letters of any script stay as they are.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class ExportError(Exception):
    """Base of every error this package raises on purpose. The message is one printable line."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split("\n"))))


class RequestError(ExportError, ValueError):
    """The request can't be met as it was made: a bad option, an unreadable file, a provider that is not usable."""

    exit_status = 2


class CheckError(ExportError):
    """A check failed: parity, a corrupted bundle, an export that froze a dimension."""


class NotFiniteError(CheckError):
    """What a graph gave for finite frames within the limit is not finite.

    Attributes:
        entry: the first entry of the batch with such an output.
    """

    def __init__(self, message: str, entry: int = 0) -> None:
        super().__init__(message)
        self.entry = entry


_MOST = 300
"""Characters of another library's error that a message may carry: it may quote a file at length."""


def brief(error: object) -> str:
    """What an error of another library says, in one line of bounded length; of one that says nothing its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"
