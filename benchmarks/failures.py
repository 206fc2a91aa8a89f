"""What could not be measured, in one line."""

from __future__ import annotations

from dipgo.base.errors import DipgoError


class NotMeasuredError(Exception):
    """A program that could not be measured: the message is one line that the report prints in its row."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return an error as one line; its class too where the project did not raise it."""
    text = " ".join(str(error).split())[:limit]
    own = isinstance(error, DipgoError | NotMeasuredError)
    return text if own else f"{type(error).__name__}: {text}".rstrip(": ")
