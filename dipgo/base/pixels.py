"""Sizes of images as users write them."""

from __future__ import annotations

from dipgo.base.errors import UsageError


def pixels_of(size: str | None) -> tuple[int, int] | None:
    """Return height and width of ``N`` or ``HEIGHTxWIDTH`` in pixels.

    Raises:
        UsageError: anything else.
    """
    if size is None:
        return None
    sides = size.lower().split("x")
    if not all(side.isascii() and side.isdecimal() and 0 < len(side) < 6 for side in sides) or len(sides) > 2:
        raise UsageError(f"--size {size}: give pixels, N or HEIGHTxWIDTH, such as 512 or 512x768")
    return int(sides[0]), int(sides[-1])
