"""A scheduler run on vectors of one's own: as noise, as what it draws, and as outputs of the denoiser."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError, one_line
from dipgo.model.noise_source import drawing


@dataclass(frozen=True)
class Run:
    """A scheduler as a pipeline sets it: for attributes see :func:`dipgo.model.sampler.tabulate`."""

    scheduler: Any
    steps: int
    settings: Mapping[str, Any]
    begin: int | None
    given: Mapping[str, Any]

    @property
    def first_scale(self) -> float:
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @property
    def options(self) -> dict[str, Any]:
        """What ``step`` is given by name, of what it takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in self.given.items() if name in accepted}

    def start(self) -> None:
        try:
            self.scheduler.set_timesteps(**self.settings)
        except Exception as error:  # whatever a scheduler may say of its configuration
            raise UsageError(
                f"{type(self.scheduler).__name__} refuses {self.steps} steps: {one_line(error)}"
            ) from error
        if self.begin is not None:
            self.scheduler.set_begin_index(self.begin)


@dataclass(frozen=True)
class Seen:
    """A run: the inputs of the calls ``[calls, n]``, the latents before and after them ``[calls + 1, n]``."""

    inputs: np.ndarray
    latents: np.ndarray
    draws: int


def combined(run: Run, vectors: np.ndarray, draws: int) -> Seen:
    """Run the scheduler on vectors ``[1 + draws + calls, n]``, in the order of a table's columns."""
    noise, drawn, outputs = np.split(vectors, [1, 1 + draws])
    return trajectory(run, np.concatenate([noise, outputs]), drawn)


def trajectory(run: Run, vectors: np.ndarray, drawn: Iterable[np.ndarray]) -> Seen:
    """Run the scheduler with ``vectors[0]`` as noise and ``vectors[k + 1]`` as the output of call k.

    ``drawn`` is what it draws, a vector each time.
    """
    run.start()
    scheduler, options, left, draws = run.scheduler, run.options, iter(drawn), itertools.count()
    images = torch.from_numpy(vectors)[:, None, :, None, None]  # some schedulers insist on [B, C, H, W]
    latent = images[0] * run.first_scale

    def draw(original: Any, shape: Any, generator: Any = None, **_: Any) -> torch.Tensor:
        if generator is None:
            raise UsageError(
                f"sampler {type(scheduler).__name__} draws noise, and this pipeline gives it no generator to draw it "
                f"from, so that no seed determines an image; use ddim"
            )
        next(draws)
        return torch.from_numpy(next(left)).view(shape)

    inputs, latents = [], [latent]
    with drawing(type(scheduler), draw):
        for call, timestep in enumerate(scheduler.timesteps):
            scales = hasattr(scheduler, "scale_model_input")
            inputs.append(scheduler.scale_model_input(latent, timestep) if scales else latent)
            latent = scheduler.step(images[call + 1], timestep, latent, **options).prev_sample.to(torch.float64)
            latents.append(latent)
    before, after = (torch.stack(each).flatten(1).numpy() for each in (inputs, latents))
    return Seen(before, after, next(draws))
