"""What a schedule of gates costs, in MACs over the trajectory."""

from __future__ import annotations

import numpy as np

from dipgo.base.errors import UsageError
from dipgo.graph.trace import Trace
from dipgo.schedule.subnet import Cost


def is_silent(trace: Trace, row: np.ndarray, learned: bool) -> bool:
    """Whether ε under ``row`` is the last ε: it reads neither latent nor timestep, and backups are last outputs."""
    return not learned and not row.any() and not trace.reads_input(row)


def trajectory_macs(trace: Trace, gates: np.ndarray, learned: bool = False) -> int:
    """MACs of all calls under ``gates`` (bool ``[calls, sites]``, canonical); a silent step costs nothing."""
    return sum(trace.macs(row) for row in gates if not is_silent(trace, row, learned))


def cost_of(trace: Trace, gates: np.ndarray, learned: bool = False) -> Cost:
    """Return the SubNet's cost record for ``gates``."""
    full = trace.full_macs * len(gates)
    kept = trajectory_macs(trace, gates, learned)
    return Cost(full=full, subnet=kept, ratio=kept / full)


def check_budget(trace: Trace, budget: float, calls: int, learned: bool = False) -> None:
    """Refuse a budget outside (0, 1], or one that the cheapest SubNet (step 0 full, all else skipped) exceeds."""
    if not 0 < budget <= 1:
        raise UsageError(f"budget {budget} is outside (0, 1]; give the share of the full trajectory's MACs to keep")
    cheapest = np.zeros((calls, len(trace.sites)), bool)
    cheapest[0] = True
    least = cost_of(trace, cheapest, learned)
    if least.subnet > budget * trace.full_macs * calls:  # as everything that meets a budget counts
        raise UsageError(
            f"budget {budget} is below {least.ratio:.4f}, what step 0 and the ungated parts alone cost at {calls} "
            f"steps; give at least {np.ceil(least.ratio * 1000) / 1000:.3f}"
        )
