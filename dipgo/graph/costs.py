"""What calls of a traced denoiser cost: MACs as the trace counts them, or time as a profile measured it.

Fixed schedules, and everything that meets a budget, take costs: a budget is a share of what the full trajectory costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dipgo.base.errors import UsageError

if TYPE_CHECKING:  # schedules are read without torch
    from dipgo.graph.trace import Trace


@dataclass(frozen=True, eq=False)
class Costs:
    """What the nodes of a traced graph cost, and by them calls and trajectories.

    Attributes:
        trace: from which follows what a call runs.
        unit: ``MACs``, of one row of the denoiser's batch (guidance doubles them), or ``ns``, of one image.
        nodes: costs by the names of nodes; a node that is not named costs nothing.
    """

    trace: Trace
    unit: str
    nodes: Mapping[str, int]

    @cached_property
    def full(self) -> int:
        """One call with every gate 1."""
        return self.call(np.ones(len(self.trace.sites), bool))

    @cached_property
    def sites(self) -> tuple[int, ...]:
        """For each site what goes when it alone is skipped: it, and what feeds nothing else."""
        return tuple(self._sum(self.trace.freed(site)) for site in range(len(self.trace.sites)))

    def call(self, row: np.ndarray) -> int:
        """One call under a row of gates, bool ``[sites]``."""
        return self._call(tuple(bool(gate) for gate in row))

    def trajectory(self, gates: np.ndarray, learned: bool = False) -> int:
        """All calls under ``gates`` (bool ``[calls, sites]``, canonical); a silent step costs nothing."""
        return sum(self.call(row) for row in gates if not self.trace.is_silent(row, learned))

    def limit(self, budget: float, calls: int) -> float:
        """What a trajectory of so many calls may cost under a budget."""
        return budget * self.full * calls

    def fits(self, gates: np.ndarray, budget: float, learned: bool = False) -> bool:
        """Whether a trajectory under ``gates`` meets a budget."""
        return self.trajectory(gates, learned) <= self.limit(budget, len(gates))

    @lru_cache(maxsize=65536)  # noqa: B019 - costs live as long as the process that searches with them
    def _call(self, row: tuple[bool, ...]) -> int:
        return self._sum(self.trace.running(np.array(row)))

    def _sum(self, names: set[str]) -> int:
        return sum(self.nodes.get(name, 0) for name in names)


def check_budget(costs: Costs, budget: float, calls: int, learned: bool = False) -> None:
    """Refuse a budget outside (0, 1], or one that the cheapest SubNet (step 0 full, all else skipped) exceeds."""
    if not 0 < budget <= 1:
        raise UsageError(f"budget {budget} is outside (0, 1]; give the share of the full trajectory's MACs to keep")
    cheapest = np.zeros((calls, len(costs.trace.sites)), bool)
    cheapest[0] = True
    if not costs.fits(cheapest, budget, learned):
        least = costs.trajectory(cheapest, learned) / (costs.full * calls)
        raise UsageError(
            f"budget {budget} is below {least:.4f}, what step 0 and the ungated parts alone cost at {calls} "
            f"steps; give at least {np.ceil(least * 1000) / 1000:.3f}"
        )
