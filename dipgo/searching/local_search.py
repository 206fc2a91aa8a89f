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
    score: Callable[[Steps, int], np.ndarray],
    groups: int,
    moves: int,
    seed: int,
    after: Callable[[int, float], None] = lambda measured, best: None,
) -> Steps:
    """Return as many computed steps as there are in ``begun``, where no move of one step is known to be better.

    The neighbours of what is best so far are measured in random order, and the first that is better takes its place.
    A race (Maron and Moore 1994): images are measured group by group, and one that is behind by more than chance on
    the same images is given up. The first call is always computed.

    Args:
        begun: distinct computed steps, from 0 to below ``calls``, in order.
        score: of computed steps, on a group of images: each image's in dB, higher is better.
        groups: how many groups of images there are.
        moves: how many are measured at most.
        after: called with the number of measurements so far and the mean score of the best.
    """
    chance = np.random.default_rng(seed)
    best = tuple(begun)
    held, seen = np.concatenate([score(best, group) for group in range(groups)]), {best}

    def raced(steps: Steps) -> np.ndarray | None:
        scores = np.empty(0)
        for group in range(groups):
            scores = np.append(scores, score(steps, group))
            if behind(scores - held[: len(scores)]):
                return None
        return scores if scores.mean() > held.mean() + GAIN_DB else None

    def better() -> Steps | None:
        nonlocal held
        options = [steps for steps in neighbours(best, calls) if steps not in seen]
        for place in chance.permutation(len(options)):
            if len(seen) > moves:
                return None
            seen.add(options[place])
            scores = raced(options[place])
            held = held if scores is None else scores
            after(len(seen) - 1, float(held.mean()))
            if scores is not None:
                return options[place]
        return None

    while moved := better():
        best = moved
    return best


def behind(gains: np.ndarray) -> bool:
    """Whether what gains this much on some images is worse than nothing by more than a standard error."""
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return bool(gains.mean() + error < 0)


def neighbours(steps: Steps, calls: int) -> Iterator[Steps]:
    """Yield the steps with one of them, but the first, earlier or later by up to :data:`REACH`."""
    for step in steps[1:]:
        for other in range(max(1, step - REACH), min(calls, step + REACH + 1)):
            if other not in steps:
                yield tuple(sorted({*steps, other} - {step}))
