"""From scores to gates at a budget (paper, Algorithm 1), with dependencies read from the traced graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dipgo.graph.costs import Costs
from dipgo.graph.liveness import canonical


def gates_at_budget(costs: Costs, scores: np.ndarray, budget: float, history: int = 1) -> np.ndarray:
    """Keep the gates with the highest scores, as many as the budget allows.

    Bisection on one global threshold, as in the paper; what nobody reads goes ("remove the dependents") before costs
    are counted. What the threshold leaves over is then filled with the best single gates that still fit, which
    brings the result as close to the budget as the sites' sizes allow.

    Args:
        scores: float ``[calls, sites]``, higher = keep; the first step is always kept.
        history: K; above 1 backups will have weights, and a step that only serves is not silent.

    Returns:
        Canonical gates, bool ``[calls, sites]``.
    """
    trace, learned, calls = costs.trace, history > 1, len(scores)
    limit = costs.limit(budget, calls)
    order = np.argsort(-scores[1:].reshape(-1), kind="stable")

    def keep(count: int) -> np.ndarray:
        flat = np.zeros(order.shape, bool)
        flat[order[:count]] = True
        gates = np.concatenate([np.ones((1, scores.shape[1]), bool), flat.reshape(calls - 1, -1)])
        return canonical(gates, history, trace.live_sites)

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if costs.fits(keep(middle), budget, learned):
            low = middle
        else:
            high = middle - 1
    gates = keep(low)
    changed = True
    while changed:  # a gate that nobody read before may be read now, so another pass may find more
        changed = False
        left = limit - costs.trajectory(gates, learned)
        for flat in order:
            step, site = 1 + flat // scores.shape[1], flat % scores.shape[1]
            if gates[step, site] or costs.sites[site] > left:
                continue
            trial = gates.copy()
            trial[step, site] = True
            trial = canonical(trial, history, trace.live_sites)
            cost = costs.trajectory(trial, learned)
            if trial[step, site] and cost <= limit:
                gates, left, changed = trial, limit - cost, True
    return gates


def swept_gates(costs: Costs, scores: np.ndarray, budget: float, history: int = 1) -> np.ndarray:
    """Skip gates as the public code does: by sweeps over a falling threshold, site by site from the output inwards.

    In each sweep the sites are visited from the last to run to the first; of each, the steps whose score to skip
    exceeds the threshold are skipped, highest first, together with the sites that nobody reads then, until one more
    would go below the budget; then the next site has its turn. The threshold begins at 0.95 and falls by 0.05.

    Arguments and result as for :func:`gates_at_budget`, but what is kept lies just above the budget. Departure: what
    reads whom comes from the traced graph.
    """
    trace, learned = costs.trace, history > 1
    limit = costs.limit(budget, len(scores))
    gates = np.ones(scores.shape, bool)

    def rows_without(step: int, site: int) -> np.ndarray:
        row = gates[step].copy()
        row[site] = False
        live = trace.live_sites(row)
        return np.array([kept and index in live for index, kept in enumerate(row)])

    for threshold in np.arange(0.95, -0.01, -0.05):
        for site in reversed(trace.execution_order()):
            skip = 1 - scores[:, site]
            for step in np.argsort(-skip, kind="stable"):
                if step == 0 or not gates[step, site] or skip[step] <= threshold:
                    continue
                trial = gates.copy()
                trial[step] = rows_without(step, site)
                if costs.trajectory(trial, learned) < limit:
                    break
                gates = trial
    return canonical(gates, history, trace.live_sites)


POSTPROCESSES: dict[str, Callable[[Costs, np.ndarray, float, int], np.ndarray]] = {
    "bisection": gates_at_budget,
    "sweep": swept_gates,
}
