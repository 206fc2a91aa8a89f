"""Times of a pair: candidate and baseline in turns, by CUDA events and by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.bench.timing import no_collection

Run = Callable[[], Any]


@dataclass(frozen=True)
class Samples:
    """Seconds, one a round; ``device`` is empty where there are no events to go by."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def time_pair(
    candidate: Run, baseline: Run, on_events: tuple[bool, bool], repeats: int, seconds: float
) -> tuple[Samples, Samples]:
    """Time two programs in turns, each round the one and then the other, the next round the other way about.

    One round warms up. It ends after ``repeats`` rounds, or earlier once ``seconds`` are over and three rounds done.

    Args:
        on_events: for either, whether it runs on torch's current CUDA stream, so that events see it.

    Returns:
        The samples of the candidate and of the baseline; sample k of both is from round k.
    """
    pair = ((candidate, Samples(), on_events[0]), (baseline, Samples(), on_events[1]))
    for run, _, _ in pair:
        run()
    with no_collection():
        started = time.perf_counter()
        for number in range(repeats):
            for run, samples, events in pair[:: 1 if number % 2 == 0 else -1]:
                _sample(run, samples, events)
            if number >= 2 and time.perf_counter() - started >= seconds:
                break
    return pair[0][1], pair[1][1]


def _sample(run: Run, samples: Samples, events: bool) -> None:
    cuda = torch.cuda.is_available()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if events else (None, None)
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    if first is not None:
        first.record()
    run()
    if last is not None:
        last.record()
    if cuda:
        torch.cuda.synchronize()
    samples.wall.append(time.perf_counter() - begin)
    if first is not None and last is not None:
        samples.device.append(first.elapsed_time(last) / 1e3)
