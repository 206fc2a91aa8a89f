"""Other solvers than the bundle's: which of them makes the most of few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from dipgo.base.errors import UsageError
from dipgo.model.sampler import make_scheduler
from dipgo.searching.losses import psnr
from dipgo.searching.task import Task

SEED = 6_500_000  # of noise that neither the search nor the report draws
IMAGES, FEW, LARGE = 8, 2, 4096  # images that solvers are compared on; of latents with more values than LARGE, few

Solver = Callable[[Any], Any]
"""From a pipeline's scheduler to another one of the same noise schedule."""


def _solver(base: Any, alias: str, **options: Any) -> Any:
    scheduler = make_scheduler(alias, base)
    return type(scheduler).from_config(scheduler.config, **options)


dpm: Solver = partial(_solver, alias="dpm++2m")
SOLVERS: Mapping[str, Solver] = {
    "DPM-Solver++ 2M": dpm,
    "DPM-Solver++ 2M, Karras": partial(_solver, alias="dpm++2m", use_karras_sigmas=True),
    "UniPC": partial(_solver, alias="unipc"),
    "DDIM": partial(_solver, alias="ddim"),
    "Euler": partial(_solver, alias="euler"),
}


def best_solver(task: Task, steps: int) -> Solver:
    """Return the solver whose images in so many steps come closest to the task's full trajectory, its own left out.

    Those that this model cannot have, or that need more calls of the denoiser than steps, do not count. DPM-Solver++ 2M
    where none is left.
    """
    large = math.prod(task.sampling.shape[1:]) > LARGE
    batch = task.sampling.draw(FEW if large else IMAGES, SEED)

    def made(own: Task) -> torch.Tensor:
        with torch.no_grad():
            return own.decode(own.trajectory.full(batch.noise, batch.conditions)[-1])

    reference = made(task)
    scores: dict[str, float] = {}
    for name, solver in SOLVERS.items():
        try:
            own = task.with_sampler(solver(task.pipe.scheduler), steps)
        except UsageError:
            continue
        if own.sampler.name != task.sampler.name and own.sampler.calls == steps:
            scores[name] = psnr(made(own), reference).mean().item()
    return SOLVERS[max(scores, key=lambda name: scores[name])] if scores else dpm
