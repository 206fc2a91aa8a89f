"""Whether our packages are the ones that are imported: ``export``, ``engines`` and ``benchmarks`` are common words."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from dipgo.base.errors import DipgoError

ROOT = Path(__file__).parents[2]
"""The folder that all our packages lie in."""
PACKAGES = ("dipgo", "export", "engines", "benchmarks")


def strangers() -> dict[str, str]:
    """Return the names that lead to something else than our packages, and to what."""
    others = {}
    for name in PACKAGES:
        spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if ROOT / name not in [Path(place).absolute() for place in places]:
            others[name] = str((spec.origin if spec else None) or (places[0] if places else "nothing"))
    return others


def check_packages() -> None:
    """Refuse to go on where one of our packages is hidden.

    Raises:
        DipgoError: names it, what hides it, and what to do.
    """
    for name, place in strangers().items():
        raise DipgoError(
            f"{place} is imported, not dipgo's package '{name}'; rename it, take its folder off the path, or give "
            "dipgo an environment of its own"
        )


def leave_working_directory() -> None:
    """Import nothing from the working directory, where ``python -m`` has put it on the path, but our packages."""
    here = Path.cwd()
    if not sys.flags.safe_path and sys.path and Path(sys.path[0]) == here != ROOT:
        del sys.path[0]
