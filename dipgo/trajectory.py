"""The sampling trajectory in torch, gated and differentiable: the ground on which the search works.

The sampler is applied as a table (:mod:`dipgo.sampler`), so the whole trajectory is one differentiable function of
the gates, the backup weights and the noise. Parity with the real diffusers pipeline is a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.families import Conditions, GuidedDenoiser, join
from dipgo.gating import Rebuild, backup_name, combine, intercepting, take_apart
from dipgo.sampler import Sampler
from dipgo.sites import Site

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trajectory:
    """A denoiser, its sites and its sampler.

    Attributes:
        guided: the denoiser with guidance.
        sites: the sites that gates refer to.
        sampler: the table.
    """

    guided: GuidedDenoiser
    sites: tuple[Site, ...]
    sampler: Sampler

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.sites]

    def full(self, noise: torch.Tensor, conditions: Conditions) -> list[torch.Tensor]:
        """Run with every gate 1, without gradient; returns the latents after 0, 1, … calls, each ``[B, C, H, W]``."""
        with torch.no_grad():
            return self.integrate(noise, lambda step, latent, timestep: self.guided(latent, timestep, conditions))

    def gated(
        self, noise: torch.Tensor, conditions: Conditions, gates: np.ndarray, weights: Weights, terms: int
    ) -> list[torch.Tensor]:
        """Run under hard gates, executing only what they keep; returns the latents after 0, 1, … calls.

        Args:
            gates: bool ``[calls, sites]``.
            weights: backup tensors ``[calls, K]`` or ``[calls, K, channels]`` by name, through which gradient flows;
                empty serves the last output as it is.
            terms: K.
        """
        history: list[list[list[torch.Tensor]]] = [[] for _ in self.sites]
        rebuilds: dict[int, Rebuild] = {}

        def denoise(step: int, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            def intercept(site: int, compute: Callable[[], Any]) -> Any:
                if gates[step, site]:
                    output = compute()
                    tensors, rebuilds[site] = take_apart(output)
                    history[site] = [tensors, *history[site]][:terms]
                    return output
                return rebuilds[site](self.backup(site, step, history[site], weights))

            with intercepting(self.guided.denoiser, self.names, intercept):
                return self.guided(latent, timestep, conditions)

        return self.integrate(noise, denoise)

    def supernet(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        gates: torch.Tensor,
        weights: Weights,
        terms: int,
    ) -> list[torch.Tensor]:
        """Run the SuperNet (paper, section 3.1): both branches of every site, mixed by its gate.

        ``gates`` is float ``[calls, sites]`` with hard values 0 and 1 (straight-through: they carry gradient). A site
        hands on ``gate · output + (1 - gate) · backup``. As in the paper the newest cached output is the mixed one,
        so that gradient reaches the gates through later steps too; the first step is always computed.
        """
        hard = gates.detach() > 0.5
        history: list[list[list[torch.Tensor]]] = [[] for _ in self.sites]

        def denoise(step: int, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            def intercept(site: int, compute: Callable[[], Any]) -> Any:
                tensors, rebuild = take_apart(compute())
                if step:
                    gate = gates[step, site]
                    served = self.backup(site, step, history[site], weights)
                    tensors = [gate * new + (1 - gate) * old for new, old in zip(tensors, served, strict=True)]
                if step == 0 or hard[step, site]:
                    history[site] = [tensors, *history[site]][:terms]
                elif terms == 1:
                    history[site] = [tensors]
                return rebuild(tensors)

            with intercepting(self.guided.denoiser, self.names, intercept):
                return self.guided(latent, timestep, conditions)

        return self.integrate(noise, denoise)

    def backup(
        self, site: int, step: int, history: Sequence[Sequence[torch.Tensor]], weights: Weights
    ) -> list[torch.Tensor]:
        """Return what a skipped site serves: for each of its outputs, its weighted history (newest first)."""
        if not weights:
            return list(history[0])
        record = self.sites[site]
        return [
            combine(past, weights[backup_name(record.name, output)][step], record.channel_axis)
            for output, past in enumerate(zip(*history, strict=True))
        ]

    def integrate(
        self, noise: torch.Tensor, denoise: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        rows = torch.tensor(self.sampler.rows, dtype=noise.dtype)
        basis = [noise]
        latents = [noise * rows[0, 0]]
        for step, timestep in enumerate(self.sampler.timesteps):
            scaled = latents[-1] * self.sampler.input_scale[step]
            basis.append(denoise(step, scaled, torch.full((len(noise),), timestep)))
            coefficients = rows[step + 1, : step + 2]
            latents.append(torch.einsum("k,kbchw->bchw", coefficients, torch.stack(basis)))
        return latents


@dataclass(frozen=True)
class Batch:
    """Initial noise and conditions of some images, the unconditional half of the conditions first."""

    noise: torch.Tensor
    conditions: Conditions


class Sampling:
    """Draws noise and conditions; each seed gives one batch, always the same."""

    def __init__(
        self, pipe: Any, guided: GuidedDenoiser, family: Any, shape: Sequence[int], choices: Sequence[Any]
    ) -> None:
        self.pipe, self.guided, self.family = pipe, guided, family
        self.shape, self.choices = tuple(shape), list(choices)

    def draw(self, count: int, seed: int) -> Batch:
        """Return ``count`` pairs of noise and a class or prompt drawn from the choices."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((count, *self.shape[1:]), generator=generator)
        picks = torch.randint(len(self.choices), (count,), generator=generator).tolist()
        halves = self.family.conditions(self.pipe, [self.choices[pick] for pick in picks])
        return Batch(noise, join(halves[0], halves[1], self.guided.guided))
