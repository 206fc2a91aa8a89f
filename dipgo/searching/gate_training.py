"""Gates optimised by gradient through the whole trajectory, with straight-through hard gates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dipgo.graph.costs import Costs
from dipgo.schedule.schedule import Schedule
from dipgo.searching.pruner import Pruner, straight_through
from dipgo.searching.training_loop import Training, optimise


@dataclass(frozen=True)
class Sparsity:
    """The paper's sparsity loss: its weight α, the share of MACs τ below which it rests, whether γ weights gates."""

    alpha: float = 1.0
    tau: float = 0.2
    gamma: bool = True


BY_THE_PAPER = Sparsity()


def dependent_shares(costs: Costs) -> torch.Tensor:
    """Return γ (paper, Eq. 3): per site, the share of a step's cost that goes when it and its dependents go."""
    trace, count = costs.trace, len(costs.trace.sites)
    shares = []
    for site in range(count):
        row = np.arange(count) != site
        live = np.isin(np.arange(count), list(trace.live_sites(row))) & row
        shares.append(1 - costs.call(live) / costs.full)
    return torch.tensor(shares, dtype=torch.float32)


def paper_scores(pruner: Pruner, costs: Costs, training: Training, sparsity: Sparsity = BY_THE_PAPER) -> np.ndarray:
    """The paper's optimisation (Eq. 3): consistency + α · sparsity while τ or more of the MACs are kept.

    Skipped sites serve their last output. The sparsity is the mean of the gates weighted by γ, so 1 where all are
    kept. It comes and goes from iteration to iteration, as in the public code. Departures: the costs that τ is compared
    with are the canonical ones of the traced graph; step 0, always computed, bears no sparsity loss; and the weights
    are divided by their sum, since with dependents they sum to more than 1.

    Returns:
        The probability to keep, float ``[calls, sites]``.
    """
    trace, trajectory = costs.trace, training.trajectory
    gamma = dependent_shares(costs) if sparsity.gamma else torch.ones(len(trace.sites))
    gamma = (gamma / gamma.sum()).to(trajectory.device)

    def loss_at(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, target = training.batches[number]
        keep = pruner()
        hard = (keep > 0.5).float()
        hard[0] = 1
        gates = straight_through(keep, hard)
        loss = training.loss(trajectory.supernet(batch.noise, batch.conditions, gates), target)
        share = Schedule(hard.cpu().numpy() > 0).canonical(trace).share(costs)
        if share >= sparsity.tau:
            loss = loss + sparsity.alpha * (gates[1:] * gamma).sum(dim=1).mean()
        return loss, {"kept": share}

    optimise(pruner, loss_at, training.descent, training.phase, trajectory.device, trajectory.precision)
    with torch.no_grad():
        return pruner().numpy()
