"""Wall times that can be compared: candidates run in turns, and are compared within each turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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


def summarise(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Return each candidate's timing from its samples in seconds; the first one is what the others are paired with."""
    first = next(iter(samples.values()))
    return {name: timing_of(own, first) for name, own in samples.items()}


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 10,
    seconds: float = 0.0,
    warm_up: int = 2,
    progress: Report = silent,
) -> dict[str, Timing]:
    """Time callables against each other.

    After ``warm_up`` untimed rounds, each round runs every candidate once, forwards and backwards in turn, so that
    drift of the machine falls on all alike. Each timed run directly follows an untimed one of the same candidate: what
    is measured is steady use of one program, not how well it finds the caches that another left. There are at least
    ``repeats`` rounds and at least ``seconds`` of them in all.
    """
    for turn in range(warm_up):
        progress("warm up", turn, warm_up, "")
        for run in candidates.values():
            run()
    if warm_up:
        progress("warm up", warm_up, warm_up, "")
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str) -> None:
        candidates[name]()
        begin = time.perf_counter()
        candidates[name]()
        samples[name].append(time.perf_counter() - begin)

    with no_collection():
        in_rounds(lambda: list(candidates), sample, repeats, seconds, progress)
    return summarise(samples)


def in_rounds(
    names: Callable[[], Sequence[str]],
    sample: Callable[[str], None],
    repeats: int,
    seconds: float,
    progress: Report = silent,
    phase: str = "time",
) -> int:
    """Take a sample of every candidate in each round, forwards and backwards in turn; returns how many rounds.

    ``names`` are asked for anew in each round: one that fails may drop out.
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


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples, as ``timeit`` does."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
