"""Liveness over a trajectory: what each step computes, serves and stores under a schedule of gates.

A gate of 1 whose output nobody reads, neither ε in the same step nor a later step's backup, is computed for nobody:
it is switched off. The rest follows from the traced graph alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

LiveSites = Callable[[np.ndarray, Iterable[int]], set[int]]


@dataclass(frozen=True)
class StepPlan:
    """One step of a trajectory.

    Attributes:
        computed: sites that run.
        served: skipped sites that are read, each with the steps whose outputs its backup combines, newest first.
        stored: computed sites whose output a later step reads.
    """

    computed: frozenset[int]
    served: dict[int, tuple[int, ...]]
    stored: frozenset[int]


def plan(gates: np.ndarray, history: int, live_sites: LiveSites) -> list[StepPlan]:
    """Return the plan of every step.

    Args:
        gates: bool ``[calls, sites]``, the first row all True.
        history: K, how many computed outputs a backup combines.
        live_sites: ``Trace.live_sites``.
    """
    stored: list[set[int]] = [set() for _ in gates]  # sites whose outputs later steps read, by step
    plans: list[StepPlan] = []
    for step in range(len(gates) - 1, -1, -1):
        row = gates[step]
        live = live_sites(row, stored[step])
        served = {
            site: tuple(int(past) for past in np.flatnonzero(gates[:step, site])[::-1][:history])
            for site in sorted(live)
            if not row[site]
        }
        for site, sources in served.items():
            for source in sources:
                stored[source].add(site)
        computed = frozenset(site for site in live if row[site])
        plans.append(StepPlan(computed, served, frozenset(stored[step])))
    return plans[::-1]


def canonical(gates: np.ndarray, history: int, live_sites: LiveSites) -> np.ndarray:
    """Return the gates with everything that is computed for nobody switched off (bool ``[calls, sites]``)."""
    result = np.zeros_like(gates, dtype=bool)
    for step, entry in enumerate(plan(np.asarray(gates, bool), history, live_sites)):
        result[step, list(entry.computed)] = True
    return result
