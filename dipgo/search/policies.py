"""Fixed policies: the schedules that a search must start from and beat.

A policy computes some steps in full and serves backups in between. What it serves is either the last output as it is
(reuse) or the straight line through the last two (extrapolation). Budgets are met from below and then filled with
part of one more step, so that policies are compared at equal MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dipgo.cost import trajectory_macs
from dipgo.gating import backup_name
from dipgo.liveness import canonical
from dipgo.trace import Trace

SPACINGS = {"uniform": 1.0, "late": 1.4, "later": 1.8, "early": 0.7}


@dataclass(frozen=True)
class Policy:
    """A schedule by rule.

    Attributes:
        name: spacing and what is served, such as ``uniform reuse``.
        gates: bool ``[calls, sites]``.
        weights: backup tensors ``[calls, 2]`` by name; empty for reuse.
    """

    name: str
    gates: np.ndarray
    weights: dict[str, np.ndarray]

    @property
    def terms(self) -> int:
        return 2 if self.weights else 1


def policies(trace: Trace, calls: int, budget: float) -> list[Policy]:
    """Return every spacing with reuse and with extrapolation, at ``budget``."""
    found = []
    for spacing, power in SPACINGS.items():
        for served, learned in (("reuse", False), ("extrapolation", True)):
            gates = spaced(trace, calls, budget, power, learned)
            weights = extrapolation(trace, gates) if learned else {}
            found.append(Policy(f"{spacing} {served}", gates, weights))
    return found


def spaced(trace: Trace, calls: int, budget: float, power: float, learned: bool = False) -> np.ndarray:
    """Return gates that compute as many whole steps as the budget allows, then fill it with part of one more.

    ``power`` 1 spaces the steps evenly, above 1 densely at the end, below 1 densely at the start.
    """
    limit = budget * trace.full_macs * calls
    best = np.zeros((calls, len(trace.sites)), bool)
    best[0] = True
    for count in range(2, calls + 1):
        gates = np.zeros_like(best)
        gates[spacing(calls, count, power)] = True
        if trajectory_macs(trace, gates, learned) > limit:
            break
        best = gates
    return fill(trace, best, limit, learned)


def spacing(calls: int, count: int, power: float) -> list[int]:
    """Return ``count`` distinct steps out of ``calls``, the first always among them."""
    positions = (1 - (1 - np.arange(count) / count) ** power) * calls
    chosen: list[int] = []
    for rank, position in enumerate(positions):
        lowest = chosen[-1] + 1 if chosen else 0
        chosen.append(int(np.clip(round(position), lowest, calls - (count - rank))))
    return chosen


def fill(trace: Trace, gates: np.ndarray, limit: float, learned: bool) -> np.ndarray:
    """Spend what is left of ``limit`` MACs on the step furthest from a computed one, from the last site backwards."""
    computed = np.flatnonzero(gates.all(axis=1))
    distance = np.abs(np.arange(len(gates))[:, None] - computed).min(axis=1)
    step = int(distance.argmax())
    result = gates.copy()
    for site in reversed(range(gates.shape[1])):
        trial = result.copy()
        trial[step, site] = True
        if trajectory_macs(trace, canonical(trial, 2 if learned else 1, trace.live_sites), learned) <= limit:
            result = trial
    return canonical(result, 2 if learned else 1, trace.live_sites)


def extrapolation(trace: Trace, gates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weights of linear extrapolation for ``gates``: tensors ``[calls, 2]`` by backup name.

    At step t, with the last computed steps a > b, a site serves f(a) + (t - a) / (a - b) · (f(a) - f(b)); with only
    one computed step it serves that one.
    """
    table = np.stack([_extrapolate(gates[:, site]) for site in range(gates.shape[1])])
    return {
        backup_name(site.name, output): table[index]
        for index, site in enumerate(trace.sites)
        for output in range(len(trace.outputs[index]))
    }


def _extrapolate(column: Sequence[bool] | np.ndarray) -> np.ndarray:
    weights = np.zeros((len(column), 2), np.float32)
    past: list[int] = []
    for step, gate in enumerate(column):
        if gate:
            past = [step, *past][:2]
        elif len(past) == 2:
            slope = (step - past[0]) / (past[0] - past[1])
            weights[step] = (1 + slope, -slope)
        else:
            weights[step] = (1, 0)
    return weights
