"""What is beyond chance: percentile bootstrap intervals of means and medians.

Values are one an image or one a round, already taken in pairs: differences on the same noise, ratios within a round.
Fewer than six have no interval, that is an infinite one: resamples of so few hardly differ from each other, whatever
chance did to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 20_000
CHANCE = 0.05  # that an interval misses
FEWEST = 6

Values = Sequence[float] | np.ndarray


def resampled(values: Values) -> np.ndarray:
    """Return ``values`` ``[n]`` drawn again with replacement, float ``[RESAMPLES, n]``; always the same draws."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(values, float)[picks]


def between(statistics: np.ndarray, measured: int, chance: float = CHANCE) -> tuple[float, float]:
    """Return between which values all but ``chance`` of the resamples' statistics lie, as much of it on either side."""
    if measured < FEWEST:
        return -np.inf, np.inf
    low, high = np.quantile(statistics, (chance / 2, 1 - chance / 2))
    return float(low), float(high)


def mean_interval(values: Values, chance: float = CHANCE) -> tuple[float, float]:
    """Return the interval of the mean."""
    return between(resampled(values).mean(axis=1), len(values), chance)


def median_interval(values: Values, chance: float = CHANCE) -> tuple[float, float]:
    """Return the interval of the median."""
    return between(np.median(resampled(values), axis=1), len(values), chance)
