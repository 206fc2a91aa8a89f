"""About how long a search will take, told before it begins from one timed call of the denoiser."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dipgo.base.units import duration
from dipgo.schedule.fixed_schedules import fixed_schedules
from dipgo.searching.config import SearchConfig
from dipgo.searching.effort import effort_of
from dipgo.searching.search import PRECISIONS
from dipgo.searching.task import Task

LEARNING, RECOMPUTING = 3.0, 4.0  # an iteration in times of its forward pass: the pass back takes twice as long


@dataclass(frozen=True)
class Forecast:
    """Seconds: of one image of the full trajectory in torch, and of the whole search."""

    image: float
    search: float

    def line(self, rest: float = 0.0) -> str:
        """Return it as text; ``rest`` is what comes after the search."""
        parts = f": {duration(self.search)} to search, {duration(rest)} to export and measure" if rest else ""
        return f"takes about {duration(self.search + rest)}{parts}"


def forecast(task: Task, config: SearchConfig) -> Forecast:
    """Foresee a search from nothing; right within a factor of two or so."""
    image = _image_seconds(task.with_trajectory(precision=PRECISIONS[config.precision]), config.batch)
    learning = config.batch * image * (RECOMPUTING if config.recompute else LEARNING)
    if config.method == "paper":  # whose SuperNet computes everything
        return Forecast(image, config.gate_iterations * learning)
    seconds = 0.0
    for budget in config.budget:
        fixed = len(fixed_schedules(task.trace.macs, task.sampler.calls, budget)) + 2  # and two by drift
        seconds += effort_of(config, budget, fixed).seconds(learning * budget, image, image * budget)
    return Forecast(image, seconds)


def _image_seconds(task: Task, batch: int) -> float:
    """Return how long an image of the full trajectory takes, from the second of two calls on a batch."""
    drawn, trajectory = task.draw(batch, 0), task.trajectory
    latent = drawn.noise[:, 0] if task.sampler.draws else drawn.noise
    timestep = torch.full((batch,), task.sampler.timesteps[0], device=latent.device)
    for _ in range(2):
        begin = time.perf_counter()
        with torch.no_grad():
            trajectory.call(latent, timestep, drawn.conditions)
        if latent.device.type == "cuda":
            torch.cuda.synchronize(latent.device)
        seconds = time.perf_counter() - begin
    return seconds / batch * task.sampler.calls
