"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from dipgo.base.guidance import rescale_of
from dipgo.model.families.family import Conditions, Family


class GuidedDenoiser(nn.Module):
    """A denoiser as one function from latent to guided ε: doubling, the call, guidance, dropping a learned variance.

    ``forward(latent [B, C, H, W], timestep [B] float32, conditions)`` returns ε ``[B, C, H, W]`` (or v, or whatever
    the model predicts: the sampler's table takes the output as it is). With guidance the conditions hold the
    unconditional half first, ``2 B`` rows in all (Ho & Salimans 2022, eq. 6 in diffusers' form:
    ε = ε_u + s (ε_c - ε_u)), then rescaled where the scale says so (:class:`dipgo.base.guidance.GuidanceScale`).
    ``guidance_scale <= 1`` switches it off, as diffusers does.
    """

    def __init__(self, denoiser: nn.Module, family: Family, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call = family.call
        self.guidance_scale = guidance_scale

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

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
        guided = unconditional + float(self.guidance_scale) * (conditional - unconditional)
        rescale = rescale_of(self.guidance_scale)
        if not rescale:
            return guided
        axes = list(range(1, guided.ndim))
        deviations = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        return guided * (rescale * deviations + (1 - rescale))


def join(unconditional: Conditions, conditional: Conditions, guided: bool) -> Conditions:
    """Stack both passes along the batch, the unconditional first; without guidance, the conditional alone."""
    if not guided:
        return conditional
    return {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}


def default_guidance(pipeline_class: type | None) -> float:
    """Return the default of a pipeline's ``guidance_scale``; 1, no guidance, where it has none."""
    option = inspect.signature(pipeline_class.__call__).parameters.get("guidance_scale") if pipeline_class else None
    return float(option.default) if option else 1.0
