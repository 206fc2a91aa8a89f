"""Fewer graphs: signatures merged at the least added MACs, for those whose engines are dear to load or to build."""

from __future__ import annotations

import numpy as np

from dipgo.base.errors import UsageError
from dipgo.graph.trace import Trace
from dipgo.schedule.fixed_schedules import extrapolation
from dipgo.schedule.schedule import Schedule, backup_outputs
from dipgo.schedule.subnet import SubNet


def merged(subnet: SubNet, trace: Trace, graphs: int) -> SubNet:
    """Return a SubNet of at most ``graphs`` distinct signatures, which computes what ``subnet`` does and more.

    Two signatures become their union, in all their steps; the pair that adds the fewest MACs goes first. Some of it may
    then be computed for nobody, that is the price of sharing a graph. A site that is computed more often has newer
    outputs to serve: where that changes what a backup combines, learned weights no longer belong to it, and linear
    extrapolation takes their place.

    Raises:
        UsageError: fewer than one graph.
    """
    if graphs < 1:
        raise UsageError(f"max-graphs = {graphs}; give at least 1")
    gates = subnet.gates.copy()
    launched = np.isin(np.arange(subnet.calls), subnet.schedule.launches(trace))
    while True:
        rows, counts = np.unique(gates[launched], axis=0, return_counts=True)
        if len(rows) <= graphs:
            break
        pairs = [(first, second) for first in range(len(rows)) for second in range(first)]
        added = [_added(trace, rows, counts, *pair) for pair in pairs]
        first, second = pairs[int(np.argmin(added))]
        either = (gates == rows[first]).all(axis=1) | (gates == rows[second]).all(axis=1)
        gates[either & launched] = rows[first] | rows[second]
    return subnet.under(Schedule(gates, _backups(subnet.schedule, trace, gates)), trace)


def _added(trace: Trace, rows: np.ndarray, counts: np.ndarray, first: int, second: int) -> int:
    union = trace.macs.call(rows[first] | rows[second])
    return sum(int(counts[k]) * (union - trace.macs.call(rows[k])) for k in (first, second))


def _backups(schedule: Schedule, trace: Trace, gates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the learned weights where histories are as they were, and extrapolation's where they are not."""
    if not schedule.learned:
        return {}
    straight, history = extrapolation(trace, gates).backups, schedule.history
    shared, backups = min(2, history), {}
    for name, site, _ in backup_outputs(trace):
        changed = [step for step in range(len(gates)) if _history_differs(schedule, gates, step, site)]
        weights = schedule.backups[name].copy()
        fallback = np.zeros((len(gates), history), np.float32)
        fallback[:, :shared] = straight[name][:, :shared]
        if history == 1:
            fallback[:, 0] = 1
        weights[changed] = fallback[changed].reshape(fallback[changed].shape + (1,) * (weights.ndim - 2))
        backups[name] = weights
    return backups


def _history_differs(schedule: Schedule, gates: np.ndarray, step: int, site: int) -> bool:
    """Whether other outputs are cached for a site at a step than before the merge."""
    now, then = (np.flatnonzero(rows[:step, site])[-schedule.history :] for rows in (gates, schedule.gates))
    return not np.array_equal(now, then)
