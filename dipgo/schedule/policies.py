"""Fixed policies: the schedules that a search must start from and beat.

A policy computes some steps in full and serves backups in between. What it serves is either the last output as it is
(reuse) or the straight line through the last two (extrapolation). Budgets are met to within one site, so that policies
are compared at equal MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dipgo.graph.liveness import canonical
from dipgo.graph.trace import Trace
from dipgo.schedule.backup_names import backup_name
from dipgo.schedule.cost import trajectory_macs
from dipgo.schedule.gates_at_budget import gates_at_budget

Spacing = Callable[[np.ndarray], np.ndarray]
"""From a computed step's rank among them to its place in the trajectory, both as shares from 0 to below 1."""

SPACINGS: dict[str, Spacing] = {
    "uniform": lambda rank: rank,
    "late": lambda rank: 1 - (1 - rank) ** 1.4,
    "early": lambda rank: 1 - (1 - rank) ** 0.7,
    "middle": lambda rank: (1 + np.sign(2 * rank - 1) * np.abs(2 * rank - 1) ** 1.4) / 2,
}
"""Where computed steps lie densely."""

SLOPES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of the straight line's slope backups may start with; the farther apart computed steps lie, the less."""

WHAT = {False: "reuse", True: "extrapolation"}
SERVINGS = ("inside", "whole", "mixed")
OUTER = (1, 2, 4)


@dataclass(frozen=True)
class Policy:
    """A schedule by rule.

    Attributes:
        name: spacing, what is served, and where.
        gates: bool ``[calls, sites]``.
        weights: backup tensors ``[calls, 2]`` by name; empty for reuse.
    """

    name: str
    gates: np.ndarray
    weights: dict[str, np.ndarray]

    @property
    def terms(self) -> int:
        return 2 if self.weights else 1


def policies(trace: Trace, calls: int, budget: float, drift: np.ndarray | None = None) -> list[Policy]:
    """Return every fixed policy that ``budget`` allows, each different gates or different backups.

    Reuse and extrapolation, with every spacing and every way to serve a skipped step; DeepCache-like ones, whose
    outer sites are computed in every step (Ma et al. 2024); and, where ``drift`` is given (see
    :func:`~dipgo.eager.drift.measure_drift`), schedules that compute a site again once it has drifted far enough, as
    SmoothCache and TeaCache do. All but those by drift come twice: with a step in part that uses up the budget, and
    ``plain``, of whole steps alone.
    """
    found: dict[tuple[bytes, bool], Policy] = {}
    limit = budget * trace.full_macs * calls

    def add(name: str, gates: np.ndarray, learned: bool) -> None:
        if trajectory_macs(trace, gates, learned) <= limit:
            policy = Policy(name, gates, extrapolation(trace, gates) if learned else {})
            found.setdefault((gates.tobytes(), learned), policy)

    def add_spaced(name: str, spacing: Spacing, serving: str, learned: bool, outer: int = 0) -> None:
        below, above = _around(trace, calls, budget, spacing, serving, learned, outer)
        add(name, trim(trace, above, below, limit, learned, _inner(trace, outer)), learned)
        add(f"{name}, plain", below, learned)

    for learned in (False, True):
        for name, spacing in SPACINGS.items():
            for serving in SERVINGS if trace.output_sites() else SERVINGS[:1]:
                add_spaced(policy_name(name, learned, serving), spacing, serving, learned)
        if drift is not None:
            add(f"by drift, {WHAT[learned]}", drifted(trace, drift, budget, learned), learned)
    for outer in OUTER:
        if 2 * outer < len(trace.sites):
            add_spaced(f"DeepCache-like, {outer} outer", SPACINGS["uniform"], "inside", False, outer)
    return list(found.values())


def policy_name(spacing: str, learned: bool, serving: str) -> str:
    """Return the name of the policy with this spacing, see :func:`spaced`."""
    return f"{spacing} {WHAT[learned]}, {serving}"


def spaced(
    trace: Trace,
    calls: int,
    budget: float,
    spacing: Spacing,
    serving: str = "inside",
    learned: bool = False,
    outer: int = 0,
) -> np.ndarray:
    """Return gates that compute whole steps, as many as the budget allows, and serve backups in between.

    One step more than fits is computed in part, if skipping sites of it and of others can meet the budget. Where even
    one computed step costs too much, so do the gates that are returned. Arguments as for :func:`whole_steps`.
    """
    below, above = _around(trace, calls, budget, spacing, serving, learned, outer)
    return trim(trace, above, below, budget * trace.full_macs * calls, learned, _inner(trace, outer))


def _around(
    trace: Trace, calls: int, budget: float, spacing: Spacing, serving: str, learned: bool, outer: int
) -> list[np.ndarray]:
    """Return the gates of the two lists of :func:`whole_steps`."""
    lists = whole_steps(trace, calls, budget, spacing, serving, learned, outer)
    return [gates_of_steps(trace, calls, steps, serving, learned, outer) for steps in lists]


def whole_steps(
    trace: Trace, calls: int, budget: float, spacing: Spacing, serving: str, learned: bool, outer: int = 0
) -> tuple[list[int], list[int]]:
    """Return as many computed steps as the budget allows, and one step more; where all fit, both are the same.

    Args:
        spacing: where the computed steps lie, such as one of :data:`SPACINGS`.
        serving, learned, outer: see :func:`gates_of_steps`.
    """
    limit = budget * trace.full_macs * calls
    below = computed_steps(calls, 1, spacing)
    for count in range(2, calls + 1):
        above = computed_steps(calls, count, spacing)
        gates = gates_of_steps(trace, calls, above, serving, learned, outer)
        if trajectory_macs(trace, gates, learned) > limit:
            return below, above
        below = above
    return below, below


def gates_of_steps(
    trace: Trace, calls: int, steps: Sequence[int], serving: str, learned: bool, outer: int = 0
) -> np.ndarray:
    """Return gates that compute ``steps`` whole: bool ``[calls, sites]``.

    Args:
        serving: where a skipped step is served. ``whole``: at the output, so that nothing runs; ``inside``: at the
            inner sites, and what stands behind them runs, on today's latent and timestep; ``mixed``: whole in the
            first step after a computed one, inside in the others.
        learned: whether backups will be weighted (two terms) or last outputs.
        outer: how many of the first and of the last sites, in the order in which they run, are never skipped.
    """
    rest = _served_inside(trace, outer)
    gates = np.zeros((calls, len(trace.sites)), bool)
    for step in range(calls):
        first = step > 0 and step - 1 in steps
        if serving == "inside" or (serving == "mixed" and not first):
            gates[step] = rest
    gates[list(steps)] = True
    return canonical(gates, 2 if learned else 1, trace.live_sites)


def _served_inside(trace: Trace, outer: int) -> np.ndarray:
    """Return the sites that run in a step that is served inside: bool ``[sites]``."""
    order = trace.execution_order()
    rest = np.zeros(len(trace.sites), bool)
    rest[[*trace.output_sites(), *order[:outer], *order[len(order) - outer :]]] = True
    return rest


def _inner(trace: Trace, outer: int) -> np.ndarray:
    """Return the numbers of the sites that do not run in a step that is served inside."""
    return np.flatnonzero(~_served_inside(trace, outer))


def drifted(trace: Trace, drift: np.ndarray, budget: float, learned: bool = False) -> np.ndarray:
    """Return gates that compute a site again once the drift since it was last computed exceeds a threshold.

    The threshold is the lowest that the budget allows, by bisection; sites at the output are always computed.
    """
    calls, limit = len(drift), budget * trace.full_macs * len(drift)

    def gates_of(threshold: float) -> np.ndarray:
        gates = np.zeros(drift.shape, bool)
        since = np.zeros(drift.shape[1])
        for step in range(calls):
            since += drift[step]
            gates[step] = (since > threshold) | (step == 0)
            since[gates[step]] = 0
        gates[:, trace.output_sites()] = True
        return canonical(gates, 2 if learned else 1, trace.live_sites)

    low, high = 0.0, float(drift.sum(axis=0).max()) + 1
    for _ in range(40):
        middle = (low + high) / 2
        if trajectory_macs(trace, gates_of(middle), learned) <= limit:
            high = middle
        else:
            low = middle
    return gates_of(high)


def thinned(trace: Trace, gates: np.ndarray, drift: np.ndarray, budget: float) -> np.ndarray:
    """Return gates for a smaller budget: of what is computed, what drifted least since it last was goes first."""
    since = np.zeros(gates.shape)
    passed = np.zeros(gates.shape[1])
    for step in range(len(gates)):
        passed += drift[step]
        since[step] = passed
        passed[gates[step]] = 0
    scores = np.where(gates, 1 + since, 0.0)
    scores[:, trace.output_sites()] += since.max() + 1  # next to free, and without them a step serves nothing inside
    return gates_at_budget(trace, scores, budget, learned=True)


def computed_steps(calls: int, count: int, spacing: Spacing) -> list[int]:
    """Return ``count`` distinct steps out of ``calls``, the first always among them."""
    positions = spacing(np.arange(count) / count) * calls
    chosen: list[int] = []
    for rank, position in enumerate(positions):
        lowest = chosen[-1] + 1 if chosen else 0
        chosen.append(int(np.clip(round(position), lowest, calls - (count - rank))))
    return chosen


def trim(
    trace: Trace, above: np.ndarray, below: np.ndarray, limit: float, learned: bool, inner: np.ndarray
) -> np.ndarray:
    """Bring gates that cost too much under ``limit`` MACs: skip the sites ``inner`` of one computed step after another.

    Steps are taken from the last to the second, in each every other site from the first on, so that no site misses
    two computed steps in a row while that can be helped. Falls back to ``below`` where a whole step's worth must go.
    """
    gates = above.copy()
    if trajectory_macs(trace, gates, learned) <= limit:
        return gates
    computed = [step for step in np.flatnonzero(gates[:, inner].all(axis=1)) if step > 0]
    for offset in (0, 1):
        for number, step in enumerate(reversed(computed)):
            for site in inner[(number + offset) % 2 :: 2]:
                gates[step, site] = False
                result = canonical(gates, 2 if learned else 1, trace.live_sites)
                if trajectory_macs(trace, result, learned) <= limit:
                    return result
    return below


def extrapolation(trace: Trace, gates: np.ndarray, slope: float = 1.0) -> dict[str, np.ndarray]:
    """Return the weights of linear extrapolation for ``gates``: tensors ``[calls, 2]`` by backup name.

    At step t, with the last computed steps a > b, a site serves f(a) + slope · (t - a) / (a - b) · (f(a) - f(b)); with
    only one computed step it serves that one. A slope of 0 is reuse.
    """
    table = np.stack([_extrapolate(gates[:, site], slope) for site in range(gates.shape[1])])
    return {
        backup_name(site.name, output): table[index]
        for index, site in enumerate(trace.sites)
        for output in range(len(trace.outputs[index]))
    }


def _extrapolate(column: np.ndarray, slope: float) -> np.ndarray:
    weights = np.zeros((len(column), 2), np.float32)
    past: list[int] = []
    for step, gate in enumerate(column):
        if gate:
            past = [step, *past][:2]
        elif len(past) == 2:
            share = slope * (step - past[0]) / (past[0] - past[1])
            weights[step] = (1 + share, -share)
        else:
            weights[step] = (1, 0)
    return weights
