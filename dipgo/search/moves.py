"""Local search on the gates: moves of what is computed, each tried on the true objective.

Nothing here needs a gradient: a move is kept where the images come closer to the full trajectory's. Skipped sites
serve the straight line through their last two outputs, whose weights follow the gates, so a move never meets weights
that were learned for other gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dipgo.cost import trajectory_macs
from dipgo.liveness import canonical
from dipgo.trace import Trace

NEAR = 3  # steps that a computation may move by at once


def improve(
    trace: Trace,
    gates: np.ndarray,
    budget: float,
    score: Callable[[np.ndarray], float],
    trials: int,
    seed: int,
    after: Callable[[int, float], None] = lambda trial, best: None,
) -> np.ndarray:
    """Return gates at least as good as ``gates``: the best found by ``trials`` moves.

    Args:
        gates: bool ``[calls, sites]``, within ``budget``.
        score: of gates, higher is better, in dB.
        after: called with the number of the trial and the best score so far.
    """
    limit = budget * trace.full_macs * len(gates)
    best, best_score = gates, score(gates)
    tried = {gates.tobytes()}
    candidates = _moves(trace, np.random.default_rng(seed), lambda: best)
    for trial in range(trials):
        for candidate in candidates:
            moved = canonical(candidate, 2, trace.live_sites)
            if moved.tobytes() not in tried and trajectory_macs(trace, moved, learned=True) <= limit:
                break
        else:
            break  # every move was tried
        tried.add(moved.tobytes())
        found = score(moved)
        if found > best_score:
            best, best_score = moved, found
        after(trial + 1, best_score)
    return best


def _moves(trace: Trace, random: np.random.Generator, current: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield changes of the current gates for as long as some are likely to be new."""
    order = np.array(trace.execution_order())
    outputs = trace.output_sites()
    for _ in range(20_000):
        gates = current().copy()
        calls = len(gates)
        step = int(random.integers(1, calls))
        if outputs and random.random() < 0.3:  # serve a skipped step at the output or inside: costs next to nothing
            gates[step, outputs] = ~gates[step, outputs]
        else:  # what is computed in one step is computed in another: all of it, or a run of sites
            other = step + int(random.choice([-1, 1])) * int(random.integers(1, NEAR + 1))
            if not 1 <= other < calls:
                continue
            cuts = [0, len(order)] if random.random() < 0.5 else random.choice(len(order) + 1, 2, replace=False)
            run = order[min(cuts) : max(cuts)]
            gates[[[step], [other]], run] = gates[[[other], [step]], run]
            if outputs and random.random() < 0.5:  # the step that lost its work may be served inside instead
                emptied = step if gates[step].sum() < gates[other].sum() else other
                gates[emptied, outputs] = True
        yield gates
