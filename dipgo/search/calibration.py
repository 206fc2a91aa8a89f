"""A warm start from one calibration pass: per site, the steps to compute, by dynamic programming.

The pass runs the full trajectory with gradient and keeps, for every step and site, the output F and its sensitivity
g = Jᵀv for random probes v on the final latent. If a site is skipped at step t and serves a combination of its outputs
at steps a > b, the final latent moves by about J (F_t - w₀ F_a - w₁ F_b); the mean of (g · that difference)² over
images and probes estimates its squared length. The estimates of different skips are added, as if they did not
interact. Then each site's cheapest choice of computed steps is found exactly by dynamic programming over (a, b), and
one Lagrange multiplier on MACs meets the budget. The weights w are fitted per channel by least squares, since backups
will be learned later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.cost import trajectory_macs
from dipgo.gating import intercepting, take_apart
from dipgo.liveness import canonical
from dipgo.search.postprocess import gates_at_budget
from dipgo.trace import Trace
from dipgo.trajectory import Batch, Trajectory


@dataclass(frozen=True)
class Calibration:
    """Estimated damage of skips: ``damage[site, t, a, b]`` of serving step t from the outputs of steps a > b.

    ``b == a`` stands for "only one output yet". Float64 ``[sites, calls, calls, calls]``; unreachable entries are inf.
    """

    damage: np.ndarray


def calibrate(trajectory: Trajectory, batch: Batch, probes: int, seed: int, ridge: float = 1e-2) -> Calibration:
    """Run the calibration pass on ``batch`` with ``probes`` random directions of the final latent."""
    outputs, final = _record(trajectory, batch)
    calls, sites = len(outputs), len(outputs[0])
    flat = [tensor for step in outputs for site in step for tensor in site]
    generator = torch.Generator().manual_seed(seed)
    sensitivities = []
    for probe in range(probes):
        direction = torch.randn(final.shape, generator=generator)
        gradients = torch.autograd.grad(final, flat, direction, retain_graph=probe + 1 < probes)
        sensitivities.append(iter(gradients))
    nested = [[[[next(g) for _ in site] for site in step] for step in outputs] for g in sensitivities]

    damage = np.full((sites, calls, calls, calls), np.inf)
    images = len(batch.noise)
    for site in range(sites):
        axis = trajectory.sites[site].channel_axis
        products, grams = [], []
        for part in range(len(outputs[0][site])):
            features = torch.stack([_by_channel(outputs[t][site][part].detach(), axis, images) for t in range(calls)])
            grams.append(torch.einsum("tincx,uincx->ctu", features, features))
            for gradient in nested:
                sensitive = torch.stack([_by_channel(gradient[t][site][part], axis, images) for t in range(calls)])
                products.append((part, torch.einsum("tincx,uincx->ictu", sensitive, features)))
        damage[site] = _damage(grams, products, len(nested), ridge)
    return Calibration(damage)


def dynamic_gates(trace: Trace, calibration: Calibration, budget: float) -> np.ndarray:
    """Return the gates of least estimated damage at ``budget``, bool ``[calls, sites]``, canonical."""
    sites, calls = calibration.damage.shape[:2]
    limit = budget * trace.full_macs * calls
    scale = np.nanmax(calibration.damage[np.isfinite(calibration.damage)])
    shares = np.array([site.macs for site in trace.sites]) / trace.full_macs

    def gates_for(price: float) -> np.ndarray:
        columns = [_cheapest(calibration.damage[site], price * shares[site]) for site in range(sites)]
        return canonical(np.stack(columns, axis=1), 2, trace.live_sites)

    low, high = scale * 1e-12, scale * 1e3  # geometric bisection; the dearer, the fewer steps are computed
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        if trajectory_macs(trace, gates_for(middle), learned=True) <= limit:
            high = middle
        else:
            low = middle
    gates = gates_for(high)
    return _fill(trace, calibration, gates, budget)


def _fill(trace: Trace, calibration: Calibration, gates: np.ndarray, budget: float) -> np.ndarray:
    """Spend what the multiplier left over on the skips that hurt most."""
    scores = np.where(gates, 2.0, 0.0)
    for site in range(gates.shape[1]):
        past: list[int] = []
        for step, gate in enumerate(gates[:, site]):
            if gate:
                past = [step, *past][:2]
            else:
                hurt = calibration.damage[site, step, past[0], past[-1]]
                scores[step, site] = hurt / (hurt + 1)
    return gates_at_budget(trace, scores, budget, learned=True)


def _cheapest(damage: np.ndarray, price: float) -> np.ndarray:
    """Return the computed steps of one site, bool ``[calls]``, of least damage + price x computed steps."""
    calls = len(damage)
    # served[a, b, n]: damage of the steps strictly between a and n, served from a and b
    steps = np.arange(calls)
    table = np.where(steps[:, None, None] > steps[None, :, None], damage, 0.0)  # only t > a counts
    before = np.concatenate([np.zeros((1, calls, calls)), np.cumsum(table, axis=0)])  # sum over t < n
    best = np.full((calls, calls), np.inf)  # least cost with a the last and b the one but last computed step
    best[0, 0] = price
    came: dict[tuple[int, int], int] = {}
    for latest in range(1, calls):
        for a in range(latest):
            costs = best[a, : a + 1] + before[latest, a, : a + 1]
            b = int(costs.argmin())
            if costs[b] + price < best[latest, a]:
                best[latest, a] = costs[b] + price
                came[latest, a] = b
    total = best + before[calls]
    a, b = divmod(int(np.argmin(total)), calls)
    column = np.zeros(calls, bool)
    while True:
        column[a] = True
        if a == 0:
            return column
        a, b = b, came[a, b]


def _damage(
    grams: Sequence[torch.Tensor], products: Sequence[tuple[int, torch.Tensor]], probes: int, ridge: float
) -> np.ndarray:
    calls = grams[0].shape[-1]
    result = np.full((calls, calls, calls), np.inf)
    for a in range(calls):
        for b in range(a + 1):
            weights = [_fit(gram.double(), a, b, ridge) for gram in grams]  # per part: two of [channels, calls]
            total: list[Any] = [0.0] * probes
            for position, (part, product) in enumerate(products):
                newest, older = weights[part]
                own = torch.diagonal(product, dim1=2, dim2=3)
                moved = own - newest * product[..., a] - older * product[..., b]
                total[position % probes] = total[position % probes] + moved.sum(dim=1)
            squared = torch.stack(total).square().mean(dim=(0, 1))
            result[a + 1 :, a, b] = squared[a + 1 :].numpy()
    return result


def _fit(gram: torch.Tensor, a: int, b: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit F_t by w₀ F_a + w₁ F_b per channel, with a ridge toward extrapolation; ``gram`` is [channels, t, t]."""
    steps = torch.arange(gram.shape[-1], dtype=gram.dtype)
    if a == b:
        return torch.ones_like(gram[:, 0]), torch.zeros_like(gram[:, 0])
    slope = (steps - a) / (a - b)
    start = torch.stack([1 + slope, -slope])  # [2, t]
    normal = gram[:, [a, b]][:, :, [a, b]]
    damping = ridge * normal.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(2, dtype=gram.dtype)
    right = gram[:, [a, b]] + damping @ start
    solved = torch.linalg.solve(normal + damping + 1e-12 * torch.eye(2, dtype=gram.dtype), right)
    return solved[:, 0], solved[:, 1]


def _by_channel(tensor: torch.Tensor, axis: int, images: int) -> torch.Tensor:
    """Reshape ``[halves x images, …]`` to ``[images, halves, channels, rest]``."""
    moved = tensor.movedim(axis, 1).flatten(2) if tensor.ndim > 2 else tensor[:, :, None]
    return moved.unflatten(0, (-1, images)).transpose(0, 1).float()


def _record(trajectory: Trajectory, batch: Batch) -> tuple[list[list[list[torch.Tensor]]], torch.Tensor]:
    """Run the full trajectory with gradient; return the sites' outputs by step, and the final latent."""
    outputs: list[list[list[torch.Tensor]]] = []

    def denoise(step: int, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        kept: list[list[torch.Tensor]] = [[] for _ in trajectory.sites]

        def intercept(site: int, compute: Callable[[], Any]) -> Any:
            tensors, rebuild = take_apart(compute())
            # The weights need no gradient and neither does the noise: the outputs are where it starts.
            kept[site] = [tensor if tensor.requires_grad else tensor.requires_grad_() for tensor in tensors]
            return rebuild(kept[site])

        with intercepting(trajectory.guided.denoiser, trajectory.names, intercept):
            epsilon = trajectory.guided(latent, timestep, batch.conditions)
        outputs.append(kept)
        return epsilon

    return outputs, trajectory.integrate(batch.noise, denoise)[-1]
