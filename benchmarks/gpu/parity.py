"""Whether a program does what torch does under the same gates, before its speed counts for anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.gpu.ground import Ground, Plan
from benchmarks.gpu.records import Parity
from dipgo.eager.trajectory import Trajectory
from dipgo.model.families import Conditions, GuidedDenoiser

FLOAT32 = 1e-4  # relative: other kernels add in another order


class Reference:
    """Final latents of plans by the model's own code under gates, and how far the dtype rounds them; each made once.

    The exact run is of the first image alone: in float32 a large model takes its time.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self._known: dict[int, tuple[np.ndarray, float]] = {}

    def judge(self, plan: Plan, latent: np.ndarray) -> Parity:
        """Hold a program's final latent, float32 ``[B, C, H, W]``, against the reference; NaN never passes."""
        if id(plan) not in self._known:
            self._known[id(plan)] = self._run(plan)
        expected, rounding = self._known[id(plan)]
        error = distance(latent, expected)
        tolerance = 2 * rounding + FLOAT32
        return Parity(error=error, rounding=rounding, tolerance=tolerance, passed=bool(error <= tolerance))

    def _run(self, plan: Plan) -> tuple[np.ndarray, float]:
        ground = self.ground
        with exact_products():
            expected = gated(plan, ground.guided, ground.noise, ground.conditions)
            if ground.dtype == torch.float32:
                return expected, 0.0
            images = len(ground.noise)
            first = {  # the first image's row of either half
                name: (value[::images].float() if value.is_floating_point() else value[::images])
                for name, value in ground.conditions.items()
            }
            denoiser = copy.deepcopy(ground.denoiser).float()
            guided = GuidedDenoiser(denoiser, ground.model.family, ground.workload.guidance)
            exact = gated(plan, guided, ground.noise[:1], first)
        return expected, distance(expected[:1], exact)


def gated(plan: Plan, guided: GuidedDenoiser, noise: torch.Tensor, conditions: Conditions) -> np.ndarray:
    """Run a plan by :class:`dipgo.eager.trajectory.Trajectory`; returns the final latent."""
    trajectory = Trajectory(guided, plan.trace.sites, plan.sampler)
    weights = {name: torch.from_numpy(array) for name, array in plan.subnet.weights.items()}
    with torch.no_grad():
        latents = trajectory.gated(noise, conditions, plan.subnet.gates, weights, plan.subnet.terms)
    return np.asarray(latents[-1].float().cpu().numpy())


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ``||actual - expected||_2 / ||expected||_2``."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep convolutions in float32 from TF32, which torch has on by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
