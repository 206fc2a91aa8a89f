"""Fewer graphs: signatures merged at the least added MACs, for those whose engines are dear to load or to build."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dipgo.base.errors import UsageError
from dipgo.graph.trace import Trace
from dipgo.schedule.backup_names import backup_name
from dipgo.schedule.cost import cost_of, is_silent
from dipgo.schedule.policies import extrapolation
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
    learned = bool(subnet.weights)
    gates = subnet.gates.copy()
    launched = np.array([step == 0 or not is_silent(trace, row, learned) for step, row in enumerate(gates)])
    while True:
        rows, counts = np.unique(gates[launched], axis=0, return_counts=True)
        if len(rows) <= graphs:
            break
        pairs = [(first, second) for first in range(len(rows)) for second in range(first)]
        added = [_added(trace, rows, counts, *pair) for pair in pairs]
        first, second = pairs[int(np.argmin(added))]
        either = (gates == rows[first]).all(axis=1) | (gates == rows[second]).all(axis=1)
        gates[either & launched] = rows[first] | rows[second]
    weights = _weights(subnet, trace, gates) if learned else {}
    return replace(subnet, gates=gates, weights=weights, cost=cost_of(trace, gates, learned))


def _added(trace: Trace, rows: np.ndarray, counts: np.ndarray, first: int, second: int) -> int:
    union = trace.macs(rows[first] | rows[second])
    return sum(int(counts[k]) * (union - trace.macs(rows[k])) for k in (first, second))


def _weights(subnet: SubNet, trace: Trace, gates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the learned weights where histories are as they were, and extrapolation's where they are not."""
    straight = extrapolation(trace, gates)
    weights = {}
    for site, outputs in zip(subnet.sites, trace.outputs, strict=True):
        index = subnet.sites.index(site)
        changed = [
            step
            for step in range(len(gates))
            if not np.array_equal(
                np.flatnonzero(gates[:step, index])[-subnet.terms :],
                np.flatnonzero(subnet.gates[:step, index])[-subnet.terms :],
            )
        ]
        for output in range(len(outputs)):
            name = backup_name(site.name, output)
            array = subnet.weights[name].copy()
            fallback = np.zeros((len(gates), subnet.terms), np.float32)
            shared = min(2, subnet.terms)
            fallback[:, :shared] = straight[name][:, :shared]
            if subnet.terms == 1:
                fallback[:, 0] = 1
            array[changed] = fallback[changed].reshape(fallback[changed].shape + (1,) * (array.ndim - 2))
            weights[name] = array
    return weights
