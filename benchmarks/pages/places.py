"""The places in pages that benchmarks write: all between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable

from dipgo.base.errors import DipgoError

PLACE = re.compile(r"(?P<begin><!-- (?P<name>[\w.-]+):begin -->\n).*?(?P<end><!-- (?P=name):end -->)", re.DOTALL)
MARKER = re.compile(r"<!-- [\w.-]+:(?:begin|end) -->")


def names(page: str) -> list[str]:
    """Return the names of a page's places, in order."""
    return [place["name"] for place in PLACE.finditer(page)]


def fill(page: str, text: Callable[[str], str]) -> str:
    """Return a page with ``text(name)`` in each of its places.

    Raises:
        DipgoError: a marker without its other half, or a place inside another.
    """
    parts = [part for place in PLACE.finditer(page) for part in (place["begin"].strip(), place["end"])]
    if MARKER.findall(page) != parts:
        odd = next((marker for marker in MARKER.findall(page) if marker not in parts), parts[0] if parts else "")
        raise DipgoError(f"'{odd}' has no other half, or lies inside another place; mend the page's markers")
    return PLACE.sub(lambda place: f"{place['begin']}{text(place['name'])}\n{place['end']}", page)
