"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

import torch
from torch import nn

from dipgo.model.families.family import Conditions, Family


class GuidedDenoiser(nn.Module):
    """A denoiser as one function from latent to guided ε: doubling, the call, guidance, dropping a learned variance.

    ``forward(latent [B, …], timestep [B] float32, conditions)`` returns ε ``[B, …]`` (or v, or whatever the model
    predicts: the sampler's table takes the output as it is). With guidance (:attr:`guided`) the conditions hold the
    unconditional half first, ``2 B`` rows in all.
    """

    def __init__(self, denoiser: nn.Module, family: Family, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call, self.guide = family.call, family.guide
        self.guidance_scale = guidance_scale
        self.guided = family.guides(guidance_scale)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        sample, moment = latent, timestep
        if self.guided:
            sample, moment = torch.cat([latent, latent]), torch.cat([timestep, timestep])
        for name, value in conditions.items():  # tells torch.export too, which takes each size for a symbol of its own
            torch._check(value.shape[0] == sample.shape[0], lambda name=name: f"'{name}' has not the rows of the batch")
        output = self.call(self.denoiser, sample, moment, conditions)[:, : latent.shape[1]]
        if not self.guided:
            return output
        unconditional, conditional = output.chunk(2)
        return self.guide(unconditional, conditional, self.guidance_scale)


def join(unconditional: Conditions, conditional: Conditions, guided: bool) -> Conditions:
    """Stack both passes along the batch, the unconditional first; without guidance, the conditional alone."""
    if not guided:
        return conditional
    return {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
