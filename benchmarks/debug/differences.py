"""Values of two runs compared by Polygraphy: relative errors, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dipgo.base import install
from dipgo.base.errors import not_imported

Values = Mapping[str, np.ndarray]
"""Arrays by the name of a tensor."""


@dataclass(frozen=True)
class Difference:
    """Of one tensor.

    Attributes:
        error: ``||actual - expected||_2 / ||expected||_2``; NaN where one of them is not finite.
        finite: whether the actual values hold neither NaN nor infinity.
        holds: whether the values are finite and the error is within the tolerance.
    """

    error: float
    finite: bool
    holds: bool


def require_polygraphy() -> None:
    """Refuse to begin without Polygraphy.

    Raises:
        DipgoError: it is not installed.
    """
    try:
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise not_imported("polygraphy", error, install.DEBUG) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Polygraphy's log off the terminal; what it cannot go on with it raises."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def compare(expected: Values, actual: Values, tolerance: float) -> dict[str, Difference]:
    """Return the differences of the tensors that both runs have, in the order of ``expected``.

    Polygraphy's functor is called as it is: ``Comparator`` would compute statistics of every tensor for its log, which
    takes two thirds of the whole search.
    """
    from polygraphy.comparator import IterationResult, SnrCompareFunc

    names = [name for name in expected if name in actual]
    if not names:
        return {}
    runs = [
        IterationResult({name: _floats(values[name]) for name in names}, runner_name=runner)
        for runner, values in (("expected", expected), ("actual", actual))
    ]
    with quiet(), np.errstate(all="ignore"):
        results = SnrCompareFunc(decibels(tolerance))(*runs)
    finite = {name: bool(np.isfinite(runs[1][name]).all()) for name in names}
    return {
        name: Difference(_error(results[name]), finite[name], finite[name] and bool(results[name])) for name in names
    }


def decibels(tolerance: float) -> float:
    """Return the signal-to-noise ratio at which the relative error is ``tolerance``."""
    return -20 * math.log10(tolerance)


def _error(result: object) -> float:
    ratio = getattr(result, "snr", math.nan)  # a plain False where the shapes differ
    return float(10 ** (-ratio / 20))


def _floats(values: np.ndarray) -> np.ndarray:
    """Return values as Polygraphy takes them: contiguous floats."""
    return np.ascontiguousarray(values, None if values.dtype.kind == "f" else np.float64)
