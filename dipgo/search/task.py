"""What a search works on: a model, its trace, its sampler, and where noise and conditions come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.errors import UsageError
from dipgo.families import GuidedDenoiser
from dipgo.models import Model
from dipgo.records import SamplerIdentity
from dipgo.sampler import Sampler, make_scheduler, tabulate
from dipgo.search.backups import select
from dipgo.trace import Trace, trace
from dipgo.trajectory import Batch, Sampling, Trajectory


@dataclass(frozen=True)
class Task:
    """A model with everything that the search needs of it."""

    model: Model
    pipe: Any
    trace: Trace
    trajectory: Trajectory
    sampling: Sampling

    @property
    def sampler(self) -> Sampler:
        return self.trajectory.sampler

    @property
    def guidance_scale(self) -> float:
        return self.trajectory.guided.guidance_scale

    @property
    def identity(self) -> SamplerIdentity:
        sampler = self.sampler
        return SamplerIdentity(
            class_name=sampler.name,
            config=sampler.config,
            steps=sampler.steps,
            timesteps=list(sampler.timesteps),
            guidance_scale=self.guidance_scale,
        )

    def with_sampler(self, scheduler: Any, steps: int) -> Task:
        """Return the same task under another sampler."""
        sampler = tabulate(scheduler, steps, self.model.family.scales_noise)
        trajectory = Trajectory(self.trajectory.guided, self.trajectory.sites, sampler)
        return Task(self.model, self.pipe, self.trace, trajectory, self.sampling)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode final latents to images in [-1, 1], not clamped."""
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def make_task(
    model: Model,
    steps: int,
    sampler: str | None = None,
    sites: str | None = None,
    guidance_scale: float | None = None,
    traced: Trace | None = None,
) -> Task:
    """Load a model and prepare a search on it.

    Args:
        steps: inference steps.
        sampler: alias or class of a diffusers scheduler; None keeps the pipeline's own.
        sites: granularity or patterns; None takes the family's default.
        guidance_scale: None takes the default of the pipeline's ``__call__``.
        traced: a trace to use again; it must fit the other arguments.

    Raises:
        UsageError, DipgoError: see :func:`dipgo.sampler.tabulate` and :func:`dipgo.trace.trace`.
    """
    if steps < 2:
        raise UsageError(f"steps = {steps}: with one step there is nothing to reuse; give at least 2")
    pipe = model.pipeline()
    if guidance_scale is None:
        guidance_scale = float(inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)
    table = tabulate(make_scheduler(sampler, pipe.scheduler), steps, model.family.scales_noise)
    traced = traced or trace(model, sites, guidance_scale)
    family = model.family
    denoiser = getattr(pipe, family.component)
    guided = GuidedDenoiser(denoiser, family, guidance_scale)
    choices: list[Any] = sorted(set(family.labels(pipe).values())) or [""]
    sampling = Sampling(pipe, guided, family, model.latent_shape(1), choices)
    return Task(model, pipe, traced, Trajectory(guided, traced.sites, table), sampling)


class Pool:
    """Batches drawn from a pool of noise whose full trajectories are computed once, when first needed."""

    def __init__(self, task: Task, size: int, batch: int, seed: int) -> None:
        self.task, self.size, self.batch, self.seed = task, size, batch, seed
        self.parts: list[tuple[Batch, list[torch.Tensor]]] = []

    def __iter__(self) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
        chunk = max(self.batch, 32)
        generator = np.random.default_rng(self.seed)
        while len(self.parts) * chunk < self.size:
            batch = self.task.sampling.draw(chunk, self.seed * 1000 + len(self.parts))
            target = self.task.trajectory.full(batch.noise, batch.conditions)
            self.parts.append((batch, target))
            yield from self._slices(batch, target, generator)
        while True:
            for part in generator.permutation(len(self.parts)):
                batch, target = self.parts[part]
                yield from self._slices(batch, target, generator)

    def _slices(
        self, batch: Batch, target: list[torch.Tensor], generator: np.random.Generator
    ) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
        count = len(batch.noise)
        order = torch.from_numpy(generator.permutation(count))
        for picks in order.split(self.batch):
            part = Batch(batch.noise[picks], select(batch.conditions, picks, count))
            yield part, [latents[picks] for latents in target]
