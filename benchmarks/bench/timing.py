"""Wall times that can be compared: candidates run in turns, and are compared within each turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from dipgo.base.progress import Report, silent
from dipgo.base.records import Record


class Spread(Record):
    """Median and the 5th and 95th percentile (linear interpolation between samples)."""

    median: float
    p5: float
    p95: float


class Timing(Record):
    """How long one candidate took.

    ``samples`` are seconds, one a round. ``speedup`` is the spread of the rounds' own ``ratios``, first candidate's
    time over this one's: above 1 is faster than the first.
    """

    samples: list[float]
    wall: Spread
    speedup: Spread
    ratios: list[float] = Field(default_factory=list)


def spread(values: Sequence[float]) -> Spread:
    """Return median, 5th and 95th percentile."""
    p5, median, p95 = np.percentile(values, (5, 50, 95))
    return Spread(median=float(median), p5=float(p5), p95=float(p95))


def paired(first: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return ``first[k] / other[k]`` for every round k."""
    return [a / b for a, b in zip(first, other, strict=True)]


def timing_of(samples: Sequence[float], first: Sequence[float]) -> Timing:
    """Return a candidate's timing from its samples in seconds and those of the candidate that it is paired with."""
    ratios = paired(first, samples)
    return Timing(samples=list(samples), wall=spread(samples), speedup=spread(ratios), ratios=ratios)


def in_rounds(
    names: Callable[[], Sequence[str]],
    sample: Callable[[str], None],
    repeats: int,
    seconds: float,
    progress: Report = silent,
    phase: str = "time",
) -> int:
    """Take a sample of every candidate in each round, forwards and backwards in turn; returns how many rounds.

    So drift of the machine falls on all alike. There are at least ``repeats`` rounds and at least ``seconds`` of them
    in all. ``names`` are asked for anew in each round: one that fails may drop out.
    """
    started = time.perf_counter()
    elapsed, rounds = 0.0, 0
    while rounds < repeats or elapsed < seconds:
        for name in order(names(), rounds):
            sample(name)
        rounds += 1
        elapsed = time.perf_counter() - started
        finished = rounds >= repeats and elapsed >= seconds
        expected = max(repeats, round(rounds * seconds / elapsed), rounds + 1)
        progress(phase, rounds, rounds if finished else expected, "")
    return rounds


def order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order in which a round runs its candidates: as given, and backwards every other round."""
    return list(names) if turn % 2 == 0 else list(reversed(names))
