"""How far the outputs of sites move from step to step: what schedules by drift go by."""

from __future__ import annotations

import numpy as np
import torch

from dipgo.eager.sampling import Batch
from dipgo.eager.trajectory import Trajectory


def measure_drift(trajectory: Trajectory, batch: Batch) -> np.ndarray:
    """Return how far each site's output moves from step to step of the full trajectory: float ``[calls, sites]``.

    Relative L1 change (SmoothCache, Liu et al. 2024, eq. 4, with a lag of one step); 0 at the first step.
    """
    drift = np.zeros((trajectory.sampler.calls, len(trajectory.sites)))
    last: dict[int, list[torch.Tensor]] = {}

    def observe(step: int, site: int, outputs: list[torch.Tensor]) -> None:
        if site in last:
            change = sum((new - old).abs().sum() for new, old in zip(outputs, last[site], strict=True))
            size = sum(old.abs().sum() for old in last[site])
            drift[step, site] = float(change / size) if size > 0 else 0.0
        last[site] = outputs

    trajectory.observed(batch.noise, batch.conditions, observe)
    return drift
