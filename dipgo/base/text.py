"""Text of unknown origin as one line for a terminal or a log."""

from __future__ import annotations

LONGEST = 500  # characters of a line


def printable(text: str, longest: int = LONGEST) -> str:
    """Return text as one line: spaces for line breaks, escapes for what is not printable, the middle left out.

    The end stays, since that is where messages say what to do.
    """
    line = _cut(" ".join(text.split()), longest)
    return _cut("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), longest)


def _cut(line: str, longest: int) -> str:
    half = (longest - 3) // 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"
