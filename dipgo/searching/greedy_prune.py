"""Greedy pruning of gates: from a schedule that costs too much, drop the sites that are missed least.

To serve a site instead of computing it in a step costs nothing or several dB, and only a run tells which: the gradient
at the gates, how far a site's output drifts, and its place in the model rank otherwise.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from dipgo.graph.costs import Costs
from dipgo.graph.liveness import canonical
from dipgo.schedule.fixed_schedules import EXTRAPOLATION


def drop_cheapest(
    costs: Costs,
    gates: np.ndarray,
    budget: float,
    score: Callable[[np.ndarray], float],
    singles: int,
    seed: int,
    after: Callable[[int, float], None] = lambda measured, best: None,
) -> np.ndarray:
    """Return ``gates`` without the gates whose loss per cost is lowest, as many as must go to meet ``budget``.

    Lazy greedy (Minoux 1978): what each drop costs is measured alone at first; the cheapest is measured again on what
    is left, and goes once it is still the cheapest. Skipped sites extrapolate, with weights that follow the gates, so
    a drop never meets weights that were learned for other gates. Sites at the output are kept, for without them a step
    serves nothing inside; where they alone cost too much, so do the gates that are returned.

    Args:
        gates: bool ``[calls, sites]``, canonical.
        score: of gates, higher is better, in dB.
        singles: how many gates, chosen at random, are measured at first; more are where these are not enough.
        after: called with the number of measurements so far and the score of what is left.
    """
    trace, limit = costs.trace, costs.limit(budget, len(gates))
    outputs = set(trace.output_sites())
    droppable = [(int(step), int(site)) for step, site in np.argwhere(gates) if step > 0 and site not in outputs]
    waiting = [droppable[place] for place in np.random.default_rng(seed).permutation(len(droppable))]
    best, cost, quality = gates, costs.trajectory(gates, learned=True), score(gates)
    heap: list[tuple[float, int, tuple[int, int], float]] = []
    drops, measured = 0, 0

    def without(gate: tuple[int, int]) -> np.ndarray:
        left = best.copy()
        left[gate] = False
        return canonical(left, EXTRAPOLATION, trace.live_sites)

    def measure(gate: tuple[int, int]) -> None:
        nonlocal measured
        left = without(gate)
        saved = cost - costs.trajectory(left, learned=True)
        measured += 1
        if saved > 0:
            scored = score(left)
            heapq.heappush(heap, ((quality - scored) / saved, drops, gate, scored))
        after(measured, quality)

    while cost > limit and (heap or waiting):
        while waiting and (measured < singles or not heap):
            measure(waiting.pop())
        if not heap:
            break
        _, known, gate, scored = heapq.heappop(heap)
        if not best[gate]:  # nobody read it any more, so it went with another
            continue
        if known < drops:
            measure(gate)
            continue
        best, quality, drops = without(gate), scored, drops + 1
        cost = costs.trajectory(best, learned=True)
    return best
