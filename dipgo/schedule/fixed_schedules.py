"""Fixed schedules: those by rule, which a search must start from and beat.

A fixed schedule computes some steps in full and serves backups in between: either the last output as it is (reuse) or
the straight line through the last two (extrapolation). Budgets are met to within one site, so that fixed schedules are
compared at equal cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dipgo.graph.costs import Costs
from dipgo.graph.liveness import canonical
from dipgo.graph.trace import Trace
from dipgo.schedule.gates_at_budget import gates_at_budget
from dipgo.schedule.schedule import Schedule, backup_outputs

SPACINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": lambda rank: rank,
    "late": lambda rank: 1 - (1 - rank) ** 1.4,
    "early": lambda rank: 1 - (1 - rank) ** 0.7,
    "middle": lambda rank: (1 + np.sign(2 * rank - 1) * np.abs(2 * rank - 1) ** 1.4) / 2,
}
"""Where computed steps lie densely: from a step's rank among them to its place, both as shares from 0 to below 1."""

SLOPES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of the straight line's slope backups may start with; the farther apart computed steps lie, the less."""

REUSE, EXTRAPOLATION = 1, 2  # cached outputs that a backup combines
SERVED = {REUSE: "reuse", EXTRAPOLATION: "extrapolation"}
SERVINGS = ("inside", "whole", "mixed")
OUTER = (1, 2, 4)


@dataclass(frozen=True)
class Rule:
    """How a fixed schedule spaces whole steps, and what the steps in between run.

    Attributes:
        spacing: one of :data:`SPACINGS`.
        serving: where a skipped step is served. ``whole``: at the output, so that nothing runs; ``inside``: at the
            inner sites, and what stands behind them runs, on today's latent and timestep; ``mixed``: whole in the
            first step after a computed one, inside in the others.
        history: how many cached outputs a backup combines, :data:`REUSE` or :data:`EXTRAPOLATION`.
        outer: how many of the first and of the last sites, in the order in which they run, are never skipped.
    """

    spacing: str = "uniform"
    serving: str = "inside"
    history: int = REUSE
    outer: int = 0

    @property
    def name(self) -> str:
        if self.outer:
            return f"DeepCache-like, {self.outer} outer"
        return f"{self.spacing} {SERVED[self.history]}, {self.serving}"

    def whole_steps(self, costs: Costs, calls: int, budget: float) -> tuple[list[int], list[int]]:
        """Return as many computed steps as the budget allows, and one step more; where all fit, both are the same."""
        below = computed_steps(calls, 1, self.spacing)
        for count in range(2, calls + 1):
            above = computed_steps(calls, count, self.spacing)
            if not costs.fits(self.gates(costs.trace, calls, above), budget, self.history > REUSE):
                return below, above
            below = above
        return below, below

    def gates(self, trace: Trace, calls: int, steps: Sequence[int]) -> np.ndarray:
        """Return gates that compute ``steps`` whole: bool ``[calls, sites]``, canonical."""
        inner = self.inner(trace)
        gates = np.zeros((calls, len(trace.sites)), bool)
        for step in range(calls):
            first = step > 0 and step - 1 in steps
            if self.serving == "inside" or (self.serving == "mixed" and not first):
                gates[step] = ~inner
        gates[list(steps)] = True
        return canonical(gates, self.history, trace.live_sites)

    def inner(self, trace: Trace) -> np.ndarray:
        """Return the sites that do not run in a step that is served inside: bool ``[sites]``."""
        order = trace.execution_order()
        inner = np.ones(len(trace.sites), bool)
        inner[[*trace.output_sites(), *order[: self.outer], *order[len(order) - self.outer :]]] = False
        return inner

    def schedule(self, trace: Trace, gates: np.ndarray) -> Schedule:
        return extrapolation(trace, gates) if self.history > REUSE else Schedule(gates)


def fixed_schedules(costs: Costs, calls: int, budget: float, drift: np.ndarray | None = None) -> dict[str, Schedule]:
    """Return every fixed schedule that ``budget`` allows by name, each different gates or different backups.

    Reuse and extrapolation, with every spacing and every way to serve a skipped step; DeepCache-like ones, whose
    outer sites are computed in every step (Ma et al. 2024); and, where ``drift`` is given (see
    :func:`~dipgo.eager.drift.measure_drift`), schedules that compute a site again once it has drifted far enough, as
    SmoothCache and TeaCache do. All but those by drift come twice: with a step in part that uses up the budget, and
    ``plain``, of whole steps alone.
    """
    trace = costs.trace
    schedules: dict[str, Schedule] = {}
    known: set[tuple[bytes, int]] = set()

    def add(name: str, gates: np.ndarray, rule: Rule) -> None:
        key = gates.tobytes(), rule.history
        if key not in known and costs.fits(gates, budget, rule.history > REUSE):
            known.add(key)
            schedules[name] = rule.schedule(trace, gates)

    def add_spaced(rule: Rule) -> None:
        below, above = _around(costs, calls, budget, rule)
        add(rule.name, trim(costs, above, below, budget, rule), rule)
        add(f"{rule.name}, plain", below, rule)

    for history in (REUSE, EXTRAPOLATION):
        for spacing in SPACINGS:
            for serving in SERVINGS if trace.output_sites() else SERVINGS[:1]:
                add_spaced(Rule(spacing, serving, history))
        if drift is not None:
            gates = drifted(costs, drift, budget, history)
            add(f"by drift, {SERVED[history]}", gates, Rule(history=history))
    for outer in OUTER:
        if 2 * outer < len(trace.sites):
            add_spaced(Rule(outer=outer))
    return schedules


def spaced(costs: Costs, calls: int, budget: float, rule: Rule) -> Schedule:
    """Return a schedule that computes whole steps, as many as the budget allows, and serves backups in between.

    One step more than fits is computed in part, if skipping sites of it and of others can meet the budget. Where even
    one computed step costs too much, so does the schedule that is returned.
    """
    below, above = _around(costs, calls, budget, rule)
    return rule.schedule(costs.trace, trim(costs, above, below, budget, rule))


def _around(costs: Costs, calls: int, budget: float, rule: Rule) -> list[np.ndarray]:
    """Return the gates of the two lists of :meth:`Rule.whole_steps`."""
    return [rule.gates(costs.trace, calls, steps) for steps in rule.whole_steps(costs, calls, budget)]


def drifted(costs: Costs, drift: np.ndarray, budget: float, history: int = REUSE) -> np.ndarray:
    """Return gates that compute a site again once the drift since it was last computed exceeds a threshold.

    The threshold is the lowest that the budget allows, by bisection; sites at the output are always computed.
    """
    trace = costs.trace

    def gates_of(threshold: float) -> np.ndarray:
        gates = np.zeros(drift.shape, bool)
        since = np.zeros(drift.shape[1])
        for step in range(len(drift)):
            since += drift[step]
            gates[step] = (since > threshold) | (step == 0)
            since[gates[step]] = 0
        gates[:, trace.output_sites()] = True
        return canonical(gates, history, trace.live_sites)

    low, high = 0.0, float(drift.sum(axis=0).max()) + 1
    for _ in range(40):
        middle = (low + high) / 2
        if costs.fits(gates_of(middle), budget, history > REUSE):
            high = middle
        else:
            low = middle
    return gates_of(high)


def thinned(costs: Costs, gates: np.ndarray, drift: np.ndarray, budget: float) -> np.ndarray:
    """Return gates for a smaller budget: of what is computed, what drifted least since it last was goes first."""
    since = np.zeros(gates.shape)
    passed = np.zeros(gates.shape[1])
    for step in range(len(gates)):
        passed += drift[step]
        since[step] = passed
        passed[gates[step]] = 0
    scores = np.where(gates, 1 + since, 0.0)
    scores[:, costs.trace.output_sites()] += since.max() + 1  # next to free; without them a step serves nothing inside
    return gates_at_budget(costs, scores, budget, EXTRAPOLATION)


def computed_steps(calls: int, count: int, spacing: str) -> list[int]:
    """Return ``count`` distinct steps out of ``calls``, the first always among them."""
    positions = SPACINGS[spacing](np.arange(count) / count) * calls
    steps: list[int] = []
    for rank, position in enumerate(positions):
        lowest = steps[-1] + 1 if steps else 0
        steps.append(int(np.clip(round(position), lowest, calls - (count - rank))))
    return steps


def trim(costs: Costs, above: np.ndarray, below: np.ndarray, budget: float, rule: Rule) -> np.ndarray:
    """Bring gates that cost too much under the budget: skip inner sites of one computed step after another.

    Steps are taken from the last to the second, in each every other site from the first on, so that no site misses
    two computed steps in a row while that can be helped. Falls back to ``below`` where a whole step's worth must go.
    """
    trace, learned = costs.trace, rule.history > REUSE
    if costs.fits(above, budget, learned):
        return above.copy()
    gates, inner = above.copy(), np.flatnonzero(rule.inner(trace))
    computed = [step for step in np.flatnonzero(gates[:, inner].all(axis=1)) if step > 0]
    for offset in (0, 1):
        for number, step in enumerate(reversed(computed)):
            for site in inner[(number + offset) % 2 :: 2]:
                gates[step, site] = False
                trimmed = canonical(gates, rule.history, trace.live_sites)
                if costs.fits(trimmed, budget, learned):
                    return trimmed
    return below


def extrapolation(trace: Trace, gates: np.ndarray, slope: float = 1.0) -> Schedule:
    """Return the gates with backups that extrapolate linearly, weights ``[calls, 2]``.

    At step t, with the last computed steps a > b, a site serves f(a) + slope · (t - a) / (a - b) · (f(a) - f(b)); with
    only one computed step it serves that one. A slope of 0 is reuse.
    """
    table = [_extrapolate(column, slope) for column in gates.T]
    return Schedule(gates, {name: table[site] for name, site, _ in backup_outputs(trace)})


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
