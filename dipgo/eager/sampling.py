"""Noise and conditions that trajectories begin with, drawn from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dipgo.base.guidance import SCALE, spread_of
from dipgo.model.families import Conditions, GuidedDenoiser, join


@dataclass(frozen=True)
class Batch:
    """Noise and conditions of some images, those of the unconditional pass first."""

    noise: torch.Tensor
    conditions: Conditions


def select(batch: Batch, picks: torch.Tensor) -> Batch:
    """Return the images ``picks`` of a batch, each with its conditions in either pass of guidance."""
    conditions = {
        name: torch.cat([rows[picks] for rows in value.split(len(batch.noise))])
        for name, value in batch.conditions.items()
    }
    return Batch(batch.noise[picks], conditions)


class Sampling:
    """Draws noise and conditions; each seed gives one batch, always the same.

    Noise is drawn on the CPU, so that a seed means the same on every device. Each choice is encoded once, when first
    drawn, and kept on the CPU. Where the guidance scale has a spread, each image has a scale of its own within it.
    """

    def __init__(
        self, pipe: Any, guided: GuidedDenoiser, family: Any, shape: Sequence[int], choices: Sequence[Any]
    ) -> None:
        self.pipe, self.guided, self.family = pipe, guided, family
        self.shape, self.choices = tuple(shape), list(choices)
        self._encoded: dict[int, Conditions] = {}
        self._unconditional: Conditions = {}

    def draw(self, count: int, seed: int, draws: int = 0) -> Batch:
        """Return ``count`` pairs of noise and a class or prompt drawn from the choices, on the denoiser's device.

        ``draws`` is how often the sampler draws noise; the initial noise and the choices do not depend on it.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((count, *self.shape[1:]), generator=generator)
        picks = torch.randint(len(self.choices), (count,), generator=generator).tolist()
        if draws:
            drawn = torch.randn((count, draws, *self.shape[1:]), generator=generator)
            noise = torch.cat([noise[:, None], drawn], dim=1)
        rows = [self._encode(pick) for pick in picks]
        conditional = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        unconditional = {
            name: value.expand(count, *value.shape[1:]).contiguous() for name, value in self._unconditional.items()
        }
        device = next(self.guided.denoiser.parameters()).device
        joined = join(unconditional, conditional, self.guided.guided)
        joined |= self._scales(joined, count, generator)
        return Batch(noise.to(device), {name: value.to(device) for name, value in joined.items()})

    def _scales(self, joined: Conditions, count: int, generator: torch.Generator) -> Conditions:
        """Return the conditions that guidance is by, of scales that are drawn for each of ``count`` images."""
        usual = self.guided.guidance_scale
        if not spread_of(usual):
            return {}
        scales = usual + spread_of(usual) * (2 * torch.rand(count, generator=generator) - 1)
        if self.guided.guided:
            return {SCALE: scales.repeat(2).reshape(-1, *[1] * (len(self.shape) - 1))}
        return {name: (factor * scales).reshape_as(joined[name]) for name, factor in self.family.scales.items()}

    def _encode(self, pick: int) -> Conditions:
        if pick not in self._encoded:
            with torch.no_grad():
                both = self.family.conditions(self.pipe, [self.choices[pick]])
            # The unconditional conditions are the same for every choice.
            self._unconditional, self._encoded[pick] = (
                {name: value.cpu() for name, value in conditions.items()} for conditions in both
            )
        return self._encoded[pick]
