"""Gates optimised by gradient through the whole trajectory, with straight-through hard gates."""

from __future__ import annotations

import numpy as np
import torch

from dipgo.eager.trajectory import Trajectory
from dipgo.graph.liveness import canonical
from dipgo.graph.trace import Trace
from dipgo.schedule.cost import trajectory_macs
from dipgo.schedule.gates_at_budget import gates_at_budget
from dipgo.schedule.policies import extrapolation
from dipgo.searching.losses import Loss
from dipgo.searching.pruner import Pruner, straight_through
from dipgo.searching.run_folder import Phase
from dipgo.searching.task import Batches
from dipgo.searching.training_loop import Descent, optimise


def dependent_shares(trace: Trace) -> torch.Tensor:
    """Return γ (paper, Eq. 3): per site, the share of a step's MACs that goes when it and its dependents go."""
    count = len(trace.sites)
    shares = []
    for site in range(count):
        row = np.ones(count, bool)
        row[site] = False
        live = np.array([kept and index in trace.live_sites(row) for index, kept in enumerate(row)])
        shares.append(1 - trace.macs(live) / trace.full_macs)
    return torch.tensor(shares, dtype=torch.float32)


def paper_scores(
    pruner: Pruner,
    trace: Trace,
    trajectory: Trajectory,
    batches: Batches,
    descent: Descent,
    loss_of: Loss,
    phase: Phase,
    alpha: float = 1.0,
    threshold: float = 0.2,
    weighted: bool = True,
) -> np.ndarray:
    """The paper's optimisation (Eq. 3): consistency + α · sparsity while τ or more of the MACs are kept.

    Skipped sites serve their last output. The sparsity is the mean of the gates weighted by γ, so 1 where all are
    kept. It comes and goes from iteration to iteration, as in the public code. Departures: the MACs that τ is compared
    with are the canonical ones of the traced graph; step 0, always computed, bears no sparsity loss; and the weights
    are divided by their sum, since with dependents they sum to more than 1.

    Args:
        alpha: α.
        threshold: τ.
        weighted: by γ; else every gate counts alike.

    Returns:
        The probability to keep, float ``[calls, sites]``.
    """
    gamma = dependent_shares(trace) if weighted else torch.ones(len(trace.sites))
    gamma = (gamma / gamma.sum()).to(trajectory.device)

    def loss_at(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, target = batches[number]
        keep = pruner()
        hard = (keep > 0.5).float()
        hard[0] = 1
        gates = straight_through(keep, hard)
        latents = trajectory.supernet(batch.noise, batch.conditions, gates, {}, terms=1)
        loss = loss_of(latents, target)
        kept = _kept(trace, canonical(hard.cpu().numpy() > 0, 1, trace.live_sites))
        if kept >= threshold:
            loss = loss + alpha * (gates[1:] * gamma).sum(dim=1).mean()
        return loss, {"kept": kept}

    optimise(pruner, loss_at, descent, trajectory, phase)
    with torch.no_grad():
        return pruner().numpy()


def budgeted_scores(
    pruner: Pruner,
    trace: Trace,
    trajectory: Trajectory,
    batches: Batches,
    descent: Descent,
    loss_of: Loss,
    phase: Phase,
    budget: float,
) -> np.ndarray:
    """Gates by gradient at a fixed budget: every iteration runs exactly the SubNet that its scores would give.

    The hard gates are the post-processed ones, so no sparsity loss is needed and nothing is lost in post-processing;
    skipped sites extrapolate, with weights that follow the gates. The gradient reaches the scores straight through.

    Returns:
        The probability to keep, float ``[calls, sites]``.
    """

    def loss_at(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, target = batches[number]
        keep = pruner()
        hard = gates_at_budget(trace, keep.detach().cpu().numpy(), budget, learned=True)
        gates = straight_through(keep, torch.from_numpy(hard.astype(np.float32)).to(keep.device))
        weights = {name: torch.from_numpy(array) for name, array in extrapolation(trace, hard).items()}
        latents = trajectory.supernet(batch.noise, batch.conditions, gates, weights, terms=2)
        return loss_of(latents, target), {"kept": _kept(trace, hard, learned=True)}

    optimise(pruner, loss_at, descent, trajectory, phase)
    with torch.no_grad():
        return pruner().numpy()


def _kept(trace: Trace, gates: np.ndarray, learned: bool = False) -> float:
    return trajectory_macs(trace, gates, learned) / (trace.full_macs * len(gates))
