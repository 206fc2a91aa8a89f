"""Gates optimised by gradient through the whole trajectory, with straight-through hard gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dipgo.cost import trajectory_macs
from dipgo.liveness import canonical
from dipgo.search.policies import extrapolation
from dipgo.search.postprocess import gates_at_budget
from dipgo.search.pruner import Pruner, straight_through
from dipgo.trace import Trace
from dipgo.trajectory import Batch, Trajectory

Loss = Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]
Batches = Iterator[tuple[Batch, list[torch.Tensor]]]
After = Callable[[int, float], None]


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
    iterations: int,
    rate: float,
    loss_of: Loss,
    alpha: float = 1.0,
    threshold: float = 0.2,
    after: After = lambda iteration, loss: None,
) -> np.ndarray:
    """The paper's optimisation (Eq. 3): consistency + α · sparsity while more than τ of the MACs are kept.

    Skipped sites serve their last output. SGD with a cosine schedule, as in the paper. Departures: the cost that stops
    the sparsity loss is the canonical one of the traced graph, and step 0, always computed, bears no sparsity loss.

    Returns:
        The probability to keep, float ``[calls, sites]``.
    """
    optimiser = torch.optim.SGD(pruner.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    gamma = dependent_shares(trace)
    for iteration in range(iterations):
        batch, target = next(batches)
        keep = pruner()
        hard = (keep > 0.5).float()
        hard[0] = 1
        gates = straight_through(keep, hard)
        latents = trajectory.supernet(batch.noise, batch.conditions, gates, {}, terms=1)
        loss = loss_of(latents, target)
        kept = canonical(hard.numpy() > 0, 1, trace.live_sites)
        if trajectory_macs(trace, kept) / (trace.full_macs * len(kept)) >= threshold:
            loss = loss + alpha * (gates[1:] * gamma).sum(dim=1).mean() / gamma.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        after(iteration, loss.item())
    with torch.no_grad():
        return pruner().numpy()


def budgeted_scores(
    pruner: Pruner,
    trace: Trace,
    trajectory: Trajectory,
    batches: Batches,
    iterations: int,
    rate: float,
    loss_of: Loss,
    budget: float,
    after: After = lambda iteration, loss: None,
) -> np.ndarray:
    """Gates by gradient at a fixed budget: every iteration runs exactly the SubNet that its scores would give.

    The hard gates are the post-processed ones, so no sparsity loss is needed and nothing is lost in post-processing;
    skipped sites extrapolate, with weights that follow the gates. The gradient reaches the scores straight through.

    Returns:
        The probability to keep, float ``[calls, sites]``.
    """
    optimiser = torch.optim.Adam(pruner.parameters(), lr=rate)
    for iteration in range(iterations):
        batch, target = next(batches)
        keep = pruner()
        hard = gates_at_budget(trace, keep.detach().numpy(), budget, learned=True)
        gates = straight_through(keep, torch.from_numpy(hard.astype(np.float32)))
        weights = {name: torch.from_numpy(array) for name, array in extrapolation(trace, hard).items()}
        latents = trajectory.supernet(batch.noise, batch.conditions, gates, weights, terms=2)
        loss = loss_of(latents, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        after(iteration, loss.item())
    with torch.no_grad():
        return pruner().numpy()
