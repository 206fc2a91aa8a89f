"""The schedule: what is computed at which call of the denoiser, and what is served in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dipgo.graph.costs import Costs
from dipgo.graph.liveness import canonical

if TYPE_CHECKING:  # schedules are read without torch
    import torch

    from dipgo.graph.trace import Trace

_PREFIX = "backup."


@dataclass(frozen=True, eq=False)
class Schedule:
    """Gates, and what skipped sites serve.

    Attributes:
        gates: bool ``[calls, sites]``, True = compute.
        backups: weights of the cached outputs, newest first, by :func:`backup_name`: float32 ``[calls, K]``,
            ``[calls, K, channels]`` or, where the two passes of guidance have weights of their own (the unconditional
            first), ``[calls, K, 2, channels]``, with 1 for channels that all have the same. Empty means that a skipped
            site serves its last output as it is.
    """

    gates: np.ndarray
    backups: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Calls of the denoiser in one trajectory."""
        return len(self.gates)

    @property
    def learned(self) -> bool:
        """Whether backups have weights."""
        return bool(self.backups)

    @property
    def history(self) -> int:
        """K, how many cached outputs a backup combines; 1 without weights."""
        return next((weights.shape[1] for weights in self.backups.values() if weights.ndim > 1), 1)

    def canonical(self, trace: Trace) -> Schedule:
        """Return the schedule with dead gates off, and zero for the weights of outputs that are not there yet."""
        gates = canonical(self.gates, self.history, trace.live_sites)
        backups = {name: weights.copy() for name, weights in self.backups.items()}
        missing = ~cached(gates, self.history)
        for name, site, _ in backup_outputs(trace):
            if name in backups:
                backups[name][missing[:, site]] = 0
        return Schedule(gates, backups)

    def launches(self, trace: Trace) -> list[int]:
        """Return the calls that run anything: the first, and those whose ε is not simply the last ε."""
        rows = enumerate(self.gates)
        return [call for call, row in rows if call == 0 or not trace.is_silent(row, self.learned)]

    def cost(self, costs: Costs) -> int:
        """Return what a trajectory costs, in the unit of ``costs``; for a canonical schedule."""
        return costs.trajectory(self.gates, self.learned)

    def share(self, costs: Costs) -> float:
        """Return the cost as a share of the full trajectory's."""
        return self.cost(costs) / (costs.full * self.calls)

    def fits(self, costs: Costs, budget: float) -> bool:
        """Whether the share is within a budget."""
        return costs.fits(self.gates, budget, self.learned)

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return the weights of backups as tensors."""
        import torch

        return {name: torch.from_numpy(np.asarray(array)).to(device) for name, array in self.backups.items()}


def cached(gates: np.ndarray, history: int) -> np.ndarray:
    """Return whether there is a k-th newest output to serve: bool ``[calls, sites, history]``."""
    computed_before = np.cumsum(gates, axis=0) - gates
    return np.asarray(computed_before[:, :, None] > np.arange(history))


def backup_name(site: str, output: int = 0) -> str:
    """Return the name of a site's backup tensor: ``backup.<site>``, then ``#1``, ``#2`` for further outputs."""
    return f"{_PREFIX}{site}" + (f"#{output}" if output else "")


def site_of_backup(name: str) -> str | None:
    """Return the site that a backup tensor belongs to; None where this is no name of one."""
    return name.removeprefix(_PREFIX).partition("#")[0] if name.startswith(_PREFIX) else None


def backup_outputs(trace: Trace) -> Iterator[tuple[str, int, str]]:
    """Yield every output that a backup may stand for: its name, the number of its site, its node in the trace."""
    for index, (site, nodes) in enumerate(zip(trace.sites, trace.outputs, strict=True)):
        for output, node in enumerate(nodes):
            yield backup_name(site.name, output), index, node
