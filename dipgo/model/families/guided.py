"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dipgo.base.guidance import RESCALE, SCALE, rescale_of
from dipgo.model.families.family import Conditions, Family
from dipgo.model.guidance import all_passes


class GuidedDenoiser(nn.Module):
    """A denoiser as one function from latent to guided ε: doubling, the call, guidance, dropping a learned variance.

    ``forward(latent [B, …], timestep [B] float32, conditions)`` returns ε ``[B, …]`` (or v, or whatever the model
    predicts: the sampler's table takes the output as it is). With guidance (:attr:`guided`) the conditions hold the
    unconditional half first, ``2 B`` rows in all. Where :data:`SCALE` is among them it stands for the scale that the
    denoiser was made with, and each image may have its own; :data:`RESCALE` likewise.
    """

    def __init__(self, denoiser: nn.Module, family: Family, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call, self.guide = family.call, family.guide
        self.guidance_scale = guidance_scale
        self.guided = family.guides(guidance_scale)
        self.passes = family.passes(guidance_scale)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        sample, moment = (torch.cat([value] * self.passes) if self.guided else value for value in (latent, timestep))
        rows = latent.shape[0] * (2 if self.guided else 1)
        for name, value in conditions.items():  # tells torch.export too, which takes each size for a symbol of its own
            torch._check(value.shape[0] == rows, lambda name=name: f"'{name}' has not the rows of the batch")
        inputs = {
            name: all_passes(value, self.passes) for name, value in conditions.items() if name not in (SCALE, RESCALE)
        }
        output = self.call(self.denoiser, sample, moment, inputs)[:, : latent.shape[1]]
        if not self.guided:
            return output
        own = {SCALE: float(self.guidance_scale), RESCALE: rescale_of(self.guidance_scale)}
        scales = [conditions[name].chunk(2)[1] if name in conditions else value for name, value in own.items()]
        unconditional, conditional, *perturbed = output.chunk(self.passes)
        return self.guide(unconditional, conditional, *scales, *perturbed)


def with_scale_inputs(family: Family, scale: float) -> Family:
    """Return a family whose guidance is among its conditions, float32 ``[rows, 1, …]``; ``scale`` is the usual one.

    A rescale is one where the usual scale has it: else nobody pays for it. Without guidance there is nothing to choose.
    """
    if not family.guides(scale):
        return family
    usual = {SCALE: float(scale)} | ({RESCALE: rescale_of(scale)} if rescale_of(scale) else {})

    def example(config: Mapping[str, Any], rows: int) -> Conditions:
        shape = (rows, *[1] * len(family.latent(config)))
        return family.example(config, rows) | {name: torch.full(shape, value) for name, value in usual.items()}

    fixed = {name: torch.tensor([value]) for name, value in usual.items()}
    return replace(family, example=example, fixed={**family.fixed, **fixed}, scales={**family.scales, SCALE: 1.0})


def join(unconditional: Conditions, conditional: Conditions, guided: bool) -> Conditions:
    """Stack both passes along the batch, the unconditional first; without guidance, the conditional alone."""
    if not guided:
        return conditional
    return {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
