"""Local search on when to compute: one computed step at a time is moved, as long as a run says that this helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Steps = tuple[int, ...]

REACH = 2  # how far one move goes
GAIN_DB = 0.01  # the least that counts


def move_steps(
    begun: Sequence[int],
    calls: int,
    score: Callable[[Steps], float],
    moves: int,
    seed: int,
    after: Callable[[int, float], None] = lambda measured, best: None,
) -> Steps:
    """Return as many computed steps as there are in ``begun``, where no move of one step is known to be better.

    The neighbours of what is best so far are measured in random order, and the first that is better takes its place.
    The first call is always computed.

    Args:
        begun: distinct computed steps, from 0 to below ``calls``, in order.
        score: of computed steps, higher is better, in dB.
        moves: how many are measured at most.
        after: called with the number of measurements so far and the best score.
    """
    chance = np.random.default_rng(seed)
    best = tuple(begun)
    found, seen = score(best), {best}

    def better() -> Steps | None:
        nonlocal found
        options = [steps for steps in neighbours(best, calls) if steps not in seen]
        for place in chance.permutation(len(options)):
            if len(seen) > moves:
                return None
            steps = options[place]
            scored = score(steps)
            seen.add(steps)
            gained = scored > found + GAIN_DB
            found = scored if gained else found
            after(len(seen) - 1, found)
            if gained:
                return steps
        return None

    while moved := better():
        best = moved
    return best


def neighbours(steps: Steps, calls: int) -> Iterator[Steps]:
    """Yield the steps with one of them, but the first, earlier or later by up to :data:`REACH`."""
    for step in steps[1:]:
        for other in range(max(1, step - REACH), min(calls, step + REACH + 1)):
            if other not in steps:
                yield tuple(sorted({*steps, other} - {step}))
